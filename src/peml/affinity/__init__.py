"""Which tasks help each other: affinities of their gradients, and groups that follow from them."""

from peml.affinity.clusters import Clustering, cluster
from peml.affinity.record import Affinity
from peml.affinity.run import How, find_affinity, show_affinity, write_affinity

__all__ = ["Affinity", "Clustering", "How", "cluster", "find_affinity", "show_affinity", "write_affinity"]
