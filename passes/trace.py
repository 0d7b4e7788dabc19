"""Show what every graph pass did: one log line each, and on request its graphs and a timing table.

    with trace("find_sites") as did:
        sites, skipped = find_sites(graph, frozen)
        did.update(sites=len(sites), skipped=len(skipped))

logs ``find_sites: sites 2, skipped 0; 7 nodes; 0.1 ms`` at level INFO of the logger
``ss1_compile.passes.trace``. ``TORCH_LOGS="ss1_compile"`` shows that; ``TORCH_LOGS="+ss1_compile"``
adds the graph after every pass that changed it. With a ``debug_dir`` each graph gets a folder
there, written as the passes go, so that a pass that fails leaves what came before it:

==========================  ======================================================================
``00_captured.txt``         the graph before the first pass, as the Python code it stands for
``02_find_sites.txt``       the graph after pass 2; passes that left it as it was write none
``02_find_sites.diff``      the same as a unified diff
``passes.txt``, ``.json``   a row per pass: what it did, nodes and graph before and after, time
==========================  ======================================================================
"""

from __future__ import annotations

import difflib
import itertools
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import fx, nn

from ss1_compile.errors import ConfigError

log = logging.getLogger(__name__)

_FREED = re.compile(r";  (\w+ = )+None$")
"""What generated code appends to let go of values: of no interest, and it spoils the diffs."""


@dataclass
class PassRecord:
    """One pass over one graph.

    Attributes:
        name: the pass.
        did: what it counted.
        nodes_before: nodes of the graph when it began.
        nodes_after: nodes of the graph when it ended.
        milliseconds: wall-clock time it took, without the time to write graphs.
        before: the file with the graph before it; ``None`` without a ``debug_dir``.
        after: the file with the graph after it; the same file if the graph did not change.
        failed: the exception that ended it, or ``None``.
    """

    name: str
    nodes_before: int
    nodes_after: int = 0
    milliseconds: float = 0.0
    did: dict[str, int] = field(default_factory=dict)
    before: str | None = None
    after: str | None = None
    failed: str | None = None

    def __str__(self) -> str:
        counts = ", ".join(f"{what} {number}" for what, number in self.did.items())
        nodes = f"{self.nodes_before} → {self.nodes_after}"
        parts = [
            self.failed or counts or "done",
            f"{self.nodes_after if self.nodes_before == self.nodes_after else nodes} nodes",
            f"{self.milliseconds:.1f} ms",
        ]
        return f"{self.name}: {'; '.join(parts)}"


class PassTrace:
    """Runs the passes over one graph under a log.

    Attributes:
        records: a record per pass so far, in order.
        folder: the graph's own folder below ``debug_dir``, or ``None``.
    """

    def __init__(
        self, graph: fx.Graph, root: nn.Module, debug_dir: str | os.PathLike[str] | None = None
    ) -> None:
        """Start to trace ``graph``, whose ``get_attr`` nodes refer to ``root``.

        Args:
            graph: the graph that the passes edit in place.
            root: holds the bodies of higher-order operators.
            debug_dir: where to make the folder ``graph_000`` (or the next free number).

        Raises:
            ConfigError: ``debug_dir`` cannot be written to.
        """
        self.graph, self.root = graph, root
        self.records: list[PassRecord] = []
        self.folder = None if debug_dir is None else _numbered_folder(debug_dir)
        self._text = self._file = ""
        if self.folder is not None or log.isEnabledFor(logging.DEBUG):
            self._text = graph_text(graph, root)
        if self.folder is not None:
            self._file = "00_captured.txt"
            self.write(self._file, self._text)

    @contextmanager
    def __call__(self, name: str) -> Iterator[dict[str, int]]:
        """Trace the pass called ``name``; the body fills the yielded dict with its counts."""
        record = PassRecord(name, nodes_before=len(self.graph.nodes))
        started = time.perf_counter()
        try:
            yield record.did
        except Exception as error:
            record.failed = f"failed with {type(error).__name__}"
            raise
        finally:
            record.milliseconds = 1e3 * (time.perf_counter() - started)
            record.nodes_after = len(self.graph.nodes)
            self.records.append(record)
            log.info("%s", record)
            self._show_graph(record)

    def write(self, name: str, text: str) -> None:
        """Write a file into the folder, if there is one."""
        if self.folder is not None:
            (self.folder / name).write_text(text, encoding="utf-8")

    def _show_graph(self, record: PassRecord) -> None:
        if self.folder is None and not log.isEnabledFor(logging.DEBUG):
            return
        before, text = self._text, graph_text(self.graph, self.root)
        record.before = record.after = self._file or None
        if text != before:
            log.debug("graph after %s:\n%s", record.name, text)
            self._text = text
            if self.folder is not None:
                stem = f"{len(self.records):02}_{record.name.replace(' ', '_')}"
                record.after = self._file = f"{stem}.txt"
                self.write(self._file, text)
                self.write(f"{stem}.diff", _diff(before, text, record.before, record.after))
        self.write("passes.txt", table_text(self.records))
        self.write("passes.json", json.dumps([asdict(r) for r in self.records], indent=2) + "\n")


def graph_text(graph: fx.Graph, root: nn.Module) -> str:
    """The graph as Python code with shapes and source lines, then the bodies that it calls."""
    code = graph.python_code("self", verbose=True, expanded_def=True).src
    lines = (_FREED.sub("", line).rstrip() for line in code.strip().splitlines())
    parts = ["\n".join(lines)]
    for node in graph.nodes:
        body = getattr(root, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            parts.append(f"# --- {node.target} ---\n{graph_text(body.graph, body).strip()}")
    return "\n\n".join(parts) + "\n"


def table_text(records: list[PassRecord]) -> str:
    """The records as aligned plain text, with the total time."""
    rows = [("pass", "did", "nodes", "ms", "graph")]
    for record in records:
        counts = ", ".join(f"{what} {number}" for what, number in record.did.items())
        nodes = f"{record.nodes_before} → {record.nodes_after}"
        graph = record.after if record.after != record.before else "unchanged"
        done = record.failed or counts
        rows.append((record.name, done, nodes, f"{record.milliseconds:.2f}", graph or ""))
    total = sum(record.milliseconds for record in records)
    rows.append(("total", "", "", f"{total:.2f}", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}".rstrip()
        for a, b, c, d, e in rows
    ]
    return "\n".join(lines) + "\n"


def _diff(before: str, after: str, old: str | None, new: str | None) -> str:
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), old or "", new or ""
    )
    return "".join(lines)


def _numbered_folder(debug_dir: str | os.PathLike[str]) -> Path:
    """A new folder; processes may share ``debug_dir``, so making it is what claims the number."""
    parent = Path(debug_dir)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            folder = parent / f"graph_{number:03}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        raise ConfigError(
            f"debug_dir={str(debug_dir)!r} cannot be written to ({error.strerror}); name a folder"
        ) from error
    raise AssertionError("unreachable")  # itertools.count never ends
