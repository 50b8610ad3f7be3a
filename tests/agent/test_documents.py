"""Documents: headings, HTML, PDF, pieces, and what is refused."""

import pytest

from avalab.agent.retrieval import documents
from avalab.agent.retrieval.documents import Section
from avalab.lab.errors import InputError, MissingFile


def test_a_section_knows_the_headings_above_it():
    found = documents.of_markdown("before\n# A\none\n## B\ntwo\n# C\nthree\n")
    assert found == [Section("", "before"), Section("A", "one"), Section("A > B", "two"), Section("C", "three")]


def test_a_hash_inside_fenced_code_is_no_heading():
    (section,) = documents.of_markdown("# A\n```\n# not a heading\n```\n")
    assert section.heading == "A"
    assert "# not a heading" in section.text


def test_html_is_read_by_its_headings_and_without_scripts(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<h1>Tea</h1><p>Boil &amp; wait</p><script>alert(1)</script><h2>Green</h2><p>80 degrees</p>")
    assert documents.read(page) == [Section("Tea", "Boil & wait"), Section("Tea > Green", "80 degrees")]


def minimal_pdf(text: str) -> bytes:
    """A PDF of one page, written by hand (PDF 32000-1, 7.5)."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj%s endobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"xref\n0 6\n0000000000 65535 f \n%strailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (table, len(out))
    return out + end


def test_a_page_of_a_pdf_is_a_section(tmp_path):
    pytest.importorskip("pypdf", reason="PDFs need the extra `documents`")
    page = tmp_path / "page.pdf"
    page.write_bytes(minimal_pdf("Water boils at 100 degrees"))
    assert documents.read(page) == [Section("page 1", "Water boils at 100 degrees")]


def test_an_encrypted_and_a_damaged_pdf_are_refused_by_name(tmp_path):
    pypdf = pytest.importorskip("pypdf", reason="PDFs need the extra `documents`")
    source, locked, damaged = (tmp_path / name for name in ("a.pdf", "locked.pdf", "damaged.pdf"))
    source.write_bytes(minimal_pdf("secret"))
    writer = pypdf.PdfWriter(clone_from=source)
    writer.encrypt("password", algorithm="RC4-128")
    writer.write(locked)
    damaged.write_bytes(b"%PDF-1.4 and nothing more")
    with pytest.raises(InputError, match=r"locked\.pdf is encrypted"):
        documents.read(locked)
    with pytest.raises(InputError, match=r"damaged\.pdf is no PDF"):
        documents.read(damaged)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"PK\x03\x04\0\0", "is binary"), (b"caf\xe9", "is not UTF-8")],
)  # fmt: skip
def test_what_is_no_text_is_refused_by_name(tmp_path, content, said):
    file = tmp_path / "x.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"x\.txt {said}"):
        documents.read(file)


def test_an_enormous_document_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "big.txt"
    with file.open("wb") as opened:
        opened.truncate(documents.MOST_BYTES + 1)
    with pytest.raises(InputError, match="split it"):
        documents.read(file)


def test_pieces_hold_every_word_in_order_and_are_never_too_long():
    words = [f"w{n}" for n in range(1000)]
    sentences = [" ".join(words[at : at + 9]) + "." for at in range(0, 1000, 9)]
    found = documents.pieces([Section("H", " ".join(sentences))])
    assert max(len(piece.text.split()) for piece in found) <= documents.PIECE_WORDS
    seen = list(dict.fromkeys(word.rstrip(".") for piece in found for word in piece.text.split()))
    assert seen == words
    assert set(found[0].text.split()) & set(found[1].text.split()), "the end of a piece begins the next"


def test_a_folder_without_documents_is_refused(tmp_path):
    with pytest.raises(MissingFile, match="holds no document"):
        documents.find(tmp_path)
    with pytest.raises(MissingFile, match="neither a file nor a folder"):
        documents.find(tmp_path / "absent")
