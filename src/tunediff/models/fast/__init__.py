"""Faster runs of other people's networks, applied on entering a run and taken back on leaving it.

Everything that patches a network is in here, behind one door, `accelerated`; nobody imports anything else but `forget`,
by which whoever frees weights says so.
"""

from tunediff.models.fast.seam import accelerated
from tunediff.models.fast.weights import forget

__all__ = ["accelerated", "forget"]
