"""The geometry of a head's value vectors: their dimension, how they move, what they encode, who reads them.

Functions on ``[n, E]`` points (torch tensors, numpy arrays, nested lists; computed in float64) and, in front of them,
``values_of``, which gets the points from any watched model. What was measured on a model comes as torch tensors on the
CPU; what is computed from points comes as numpy arrays and floats. What is undefined is NaN.

``n`` points, ``E`` width of a value, ``C`` clusters, ``K`` components; the other letters are those of
``attnprobe.record``.
"""

from attnprobe.geometry.agreement import Agreement, agreement
from attnprobe.geometry.basis import Trajectory, common_basis, trajectory
from attnprobe.geometry.capture import values_of
from attnprobe.geometry.dimension import effective_dimension, participation_ratio, random_baseline, spectrum
from attnprobe.geometry.head import HeadValues
from attnprobe.geometry.linear import LinearFit, linear_fit
from attnprobe.geometry.prototypes import Prototypes, prototypes
from attnprobe.geometry.readers import who_uses
from attnprobe.geometry.ring import RingFit, ring_fit

__all__ = [
    "Agreement",
    "HeadValues",
    "LinearFit",
    "Prototypes",
    "RingFit",
    "Trajectory",
    "agreement",
    "common_basis",
    "effective_dimension",
    "linear_fit",
    "participation_ratio",
    "prototypes",
    "random_baseline",
    "ring_fit",
    "spectrum",
    "trajectory",
    "values_of",
    "who_uses",
]
