"""Graph passes: find the linear layers of an FX graph and rewrite them to SS1 operators.

One file each; every pass states what it rewrites and can be run alone on a hand-built graph.
"""

from ss1_compile.passes.checkpoints import inline_checkpoints
from ss1_compile.passes.expand import expand_linears
from ss1_compile.passes.frozen import FrozenValue
from ss1_compile.passes.rewrite import Rewrite, WeightSource, rewrite_sites
from ss1_compile.passes.sites import Site, Skipped, find_sites
from ss1_compile.passes.trace import PassRecord, PassTrace

__all__ = [
    "FrozenValue",
    "PassRecord",
    "PassTrace",
    "Rewrite",
    "Site",
    "Skipped",
    "WeightSource",
    "expand_linears",
    "find_sites",
    "inline_checkpoints",
    "rewrite_sites",
]
