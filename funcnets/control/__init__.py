"""Control flow for pure functions over trees, under every transform, eager and compiled."""

from funcnets.control.cond import cond, switch
from funcnets.control.loops import scan, while_loop
from funcnets.control.remat import remat
from funcnets.control.route import route

__all__ = ["cond", "remat", "route", "scan", "switch", "while_loop"]
