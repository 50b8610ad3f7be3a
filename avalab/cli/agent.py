"""The sub-commands of agents and documents: index a folder, ask it, work on a task with tools, be an MCP server."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from avalab.cli import options
from avalab.lab.errors import InputError
from avalab.lab.run import Run

TOOLS = ("calculating", "files", "python", "documents", "memory")

Model = Annotated[str, typer.Option(help="Asset, folder, artefact or GGUF file that answers.")]

MODEL = "qwen2.5-coder-0.5b-instruct"

Threads = Annotated[int, typer.Option(min=0, help="Of the engine; 0: its own number.")]

Engine = Annotated[str, typer.Option(help="Empty: llama.cpp for GGUF files, torch for folders.")]


def index(
    folder: Annotated[Path, typer.Argument(help="Folder of Markdown, HTML, text and PDF files, or one such file.")],
    out: Annotated[Path, typer.Option(help="The index, one file of sqlite.")] = Path("documents.sqlite"),
    words_only: Annotated[bool, typer.Option("--words-only", help="No vectors: smaller, and found by words.")] = False,
    threads: Threads = 0,
) -> None:
    """Read documents into an index; run again, it reads only what changed."""
    from avalab.agent.retrieval import documents, embedding
    from avalab.agent.retrieval.index import Index

    documents.find(folder)
    embedder = None if words_only else embedding.available(threads=threads)
    if embedder is None and not words_only:
        print(f"found by words alone: {embedding.WEIGHTS} or ONNX Runtime is not to be had here")
    held = Index(out, embedder)
    try:
        built = held.build(folder, progress=True)
        for name, why in built.refused.items():
            print(f"left out: {why if name in why else f'{name}: {why}'}")
        counts = f"{len(built.added)} read, {len(built.kept)} unchanged, {len(built.removed)} gone"
        print(f"{out}: {len(held):,} pieces; documents: {counts}, {len(built.refused)} left out")
    finally:
        held.close()


def ask(
    question: Annotated[str, typer.Argument(help="What is asked.")],
    documents: Annotated[Path, typer.Option(help="An index that avalab index made.")] = Path("documents.sqlite"),
    model: Model = MODEL,
    most: Annotated[int, typer.Option(min=1, max=20, help="Passages that are read.")] = 4,
    search_only: Annotated[bool, typer.Option("--search-only", help="Show the passages; ask no model.")] = False,
    engine: Engine = "",
    threads: Threads = 0,
) -> None:
    """Answer a question from documents, with sources that are checked, or say that they do not know."""
    if not question.strip():
        raise InputError("the question is empty; say what is asked, as in 'Who is the librarian?'")
    from avalab.agent.retrieval import citations, embedding
    from avalab.agent.retrieval.index import Index

    held = Index.existing(documents, embedding.available(threads=threads, fetch=False))
    try:
        if search_only:
            for piece in held.search(question, most):
                print(f"[{piece.name}] {piece.heading}\n{piece.text}\n")
            return
        from avalab.agent import speaker

        opened = speaker.open_model(model, Run("avalab_ask"), engine=engine, threads=threads)
        reply = citations.ask(opened, held, question, passages=most)
        print(reply.text)
        if reply.unsupported:
            print(f"(left out: {reply.unsupported} sentences that no passage supports)")
    finally:
        held.close()


def agent(
    task: Annotated[str, typer.Argument(help="What is to be done.")],
    tools: Annotated[str, typer.Option(help=f"With commas: {', '.join(TOOLS)}.")] = "calculating",
    model: Model = MODEL,
    workspace: Annotated[Path, typer.Option(help="The folder of `files` and `python`.")] = Path(),
    documents: Annotated[Path, typer.Option(help="The index of `documents`.")] = Path("documents.sqlite"),
    memory: Annotated[Path | None, typer.Option(help="A file that remembers between sessions.")] = None,
    mcp: Annotated[Path | None, typer.Option(help="JSON file of MCP servers and what of them is allowed.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say first what will be done.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Allow every call that writes without asking.")] = False,
    steps: Annotated[int, typer.Option(help="Calls at most.")] = 8,
    seconds: Annotated[float, typer.Option(help="Time at most.")] = 300.0,
    transcript: Annotated[Path | None, typer.Option(help="Write what happened to this Markdown file.")] = None,
    engine: Engine = "",
    threads: Threads = 0,
) -> None:
    """Let a model work on a task: it calls tools, reads what they give, and stops within limits."""
    from avalab.agent import loop

    chosen = [name.strip() for name in tools.split(",") if name.strip()]
    for name in chosen:
        options.one_of("tool", name, TOOLS)
    limits = loop.Limits(steps=steps, seconds=seconds)
    if not task.strip():
        raise InputError("the task is empty; say what is to be done, as in 'How many days until 2027-01-01?'")
    with ExitStack() as stack:
        remembered, offered = _tools(stack, chosen, workspace, documents, memory)
        if mcp:
            from avalab.agent import mcp_client

            offered += stack.enter_context(mcp_client.connected(mcp_client.read_servers(mcp)))
        from avalab.agent import speaker

        opened = speaker.open_model(model, Run("avalab_agent"), engine=engine, threads=threads)
        confirm = _always if yes else _asked
        done = loop.work_on(
            task, offered, opened, limits=limits, memory=remembered, plan=plan, confirm=confirm, say=print
        )
        print(f"({len(done.steps)} steps, {done.cost.new_tokens} tokens, {done.seconds:.1f} s)")
        if transcript:
            transcript.write_text(loop.transcript(done, opened.name), encoding="utf-8")


def _tools(stack: ExitStack, chosen: list[str], workspace: Path, documents: Path, memory: Path | None) -> tuple:
    """The memory, if any, and the chosen tools."""
    from avalab.agent import toolkit
    from avalab.agent.memory import Memory, memory_tools
    from avalab.agent.retrieval import embedding
    from avalab.agent.retrieval.index import Index

    if ("files" in chosen or "python" in chosen) and not workspace.is_dir():
        raise InputError(f"{workspace} is no folder; give one with --workspace")
    if "memory" in chosen and memory is None:
        raise InputError("the tools of memory need a file; give one with --memory notes.sqlite")
    remembered = Memory(memory) if memory else None
    offered: list[toolkit.Tool] = []
    for name in dict.fromkeys(chosen):
        if name == "documents":
            held = Index.existing(documents, embedding.available(fetch=False))
            stack.callback(held.close)
            offered.append(toolkit.document_tool(held))
        else:
            offered += {
                "calculating": toolkit.calculating_tools,
                "files": lambda: toolkit.file_tools(workspace),
                "python": lambda: [toolkit.python_tool(workspace)],
                "memory": lambda: memory_tools(remembered),
            }[name]()
    return remembered, offered


def _always(tool: object, call: object) -> bool:
    return True


def _asked(tool: object, call: object) -> bool:
    """Whether a person at the terminal allows a call that writes."""
    from avalab.serve.tools import shown_call

    return input(f"  ?? {shown_call(call)}  allow? [y/N] ").strip().lower() in ("y", "yes")


def mcp(
    folder: Annotated[Path, typer.Option(help="Where models are, and where commands run.")] = Path(),
    documents: Annotated[Path | None, typer.Option(help="An index that clients may search.")] = None,
    writes: Annotated[bool, typer.Option("--writes", help="Offer compress, which writes below the folder.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Over HTTP on loopback; 0: over stdio.")] = 0,
) -> None:
    """Be an MCP server: show, compare, search the documents and, if allowed, compress."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give the one with your models")
    from avalab.agent import mcp_server

    mcp_server.serve(mcp_server.Settings(folder, documents, writes), port=port)
