"""What a plan is made of: its ops and parameters, its seconds and bytes, what a step has to do."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from autopar.core.errors import AutoparError
from autopar.core.schedules import Phase


@dataclass(frozen=True, slots=True)
class PlannedOp:
    """One op: what each axis does (a factor of its rule, `R` or `G`) and how it prints, `S0R = S0R X RR`."""

    name: str
    segment: str
    assignment: tuple[str, ...]
    strategy: str


@dataclass(frozen=True, slots=True)
class PlannedParameter:
    """One parameter: per axis `R`, `Z` (gathered for use) or the factor it is sharded on; its spec at rest."""

    name: str
    storage: str
    spec: str


@dataclass(frozen=True, slots=True)
class PlannedSegment:
    """One segment: in each phase seconds of computing, of communication that it waits for, and of what shows of
    parameters' communication; bytes kept for its backward, and the most of a device while it runs. In a stage seconds
    and kept bytes are a micro-batch's, and `held_bytes` 0."""

    name: str
    forward_s: float
    forward_inline_s: float
    forward_exposed_s: float
    backward_s: float
    backward_inline_s: float
    backward_exposed_s: float
    saved_bytes: float
    held_bytes: float

    def __post_init__(self) -> None:
        check_finite("segment", {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "name"})

    def seconds(self, phase: Phase) -> tuple[float, float, float]:
        """Of a phase: computing, waiting for communication, and what shows of parameters' communication."""
        if phase == "forward":
            return self.forward_s, self.forward_inline_s, self.forward_exposed_s
        return self.backward_s, self.backward_inline_s, self.backward_exposed_s


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """Consecutive segments, `first` to `last`, on `devices` in the order of the mesh: seconds of a micro-batch forward
    and backward there and of bringing it to the next stage, bytes a device, micro-batches kept at once."""

    first: str
    last: str
    segments: int
    devices: tuple[int, ...]
    forward_s: float
    backward_s: float
    sent_s: float
    nbytes: float
    in_flight: int

    def __post_init__(self) -> None:
        check_finite("stage", {name: getattr(self, name) for name in ("forward_s", "backward_s", "sent_s", "nbytes")})


@dataclass(frozen=True, slots=True)
class Pipelining:
    """How a plan with stages runs: a step's micro-batches, in the order of `schedule`."""

    stages: tuple[PlannedStage, ...] = ()
    micro_batches: int = 1
    schedule: str = "1f1b"

    @property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """The devices that stages run on, each once: a schedule may put several stages on the same."""
        return tuple(dict.fromkeys(stage.devices for stage in self.stages))

    @property
    def layout(self) -> tuple[int, ...]:
        """All devices, place by place."""
        return tuple(device for place in self.places for device in place)


ALONE = Pipelining()
"""What a plan without stages has."""


@dataclass(frozen=True, slots=True)
class PlannedCheckpoint:
    """What each of `segments`, which are equal, keeps for its backward: `names` as `codegen.marks` calls values,
    `shown` by ops of the first one. Each holds `saved` bytes, makes the rest again in `seconds`, in `transient` bytes.
    """

    segments: tuple[str, ...]
    names: tuple[str, ...]
    shown: tuple[str, ...]
    saved: float
    transient: float
    seconds: float

    def __post_init__(self) -> None:
        check_finite("checkpoints", {name: getattr(self, name) for name in ("saved", "transient", "seconds")})

    def __str__(self) -> str:
        first, last = self.segments[0], self.segments[-1]
        which = first if first == last else f"{first} to {last}, {len(self.segments)} segments"
        kept = f"keeps {', '.join(self.shown)}" if self.shown else "keeps its inputs alone"
        return (f"{which}: {kept}; {self.saved / 2**20:.2f} MiB and {1e3 * self.seconds:.4f} ms of recomputation in "
                f"{self.transient / 2**20:.2f} MiB each")


@dataclass(frozen=True, slots=True)
class Seconds:
    """A predicted step: the parts add up to `step`. `bubble` is the wait of a pipeline, 0 without one."""

    step: float
    compute: float
    inline: float
    exposed: float
    optimizer: float
    bubble: float = 0.0

    def __post_init__(self) -> None:
        check_finite("plan", {name: getattr(self, part) for name, part in SECONDS.items()})


SECONDS = {"step_time_s": "step", **{f"{part}_s": part for part in ("compute", "inline", "exposed", "optimizer",
                                                                    "bubble")}}
"""What files call the fields of Seconds."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """Predicted bytes of one device at the fullest moment of a step, by kind.

    `around` is what its process takes besides: a context and communication buffers. It is None where bytes are rough
    sums of what ops make; else they are those of the code that runs, moment by moment, and `moment` says which it is.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    transient: float
    around: float | None = None
    moment: str = ""

    def __post_init__(self) -> None:
        check_finite("memory_bytes", self.by_kind)

    @property
    def by_kind(self) -> dict[str, float]:
        """The figures that are known."""
        told = dataclasses.asdict(self)
        return {name: nbytes for name, nbytes in told.items() if name != "moment" and nbytes is not None}

    @property
    def total(self) -> float:
        """All tensors together."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.transient

    @property
    def peak(self) -> float:
        """The most bytes at any time."""
        return self.total

    @property
    def device(self) -> float:
        """What a budget is compared with: the peak and what is around it."""
        return self.peak + (self.around or 0.0)


@dataclass(frozen=True, slots=True)
class Workload:
    """What a step does, however it is cut: samples and tokens of the global batch, None where it has no tokens.

    `flop` is counted once in the whole program: those of matmuls, convolutions and attention in the forward, half of
    them under a causal mask, and twice as many in the backward where a gradient flows through. Recomputation and
    pointwise work are not in it.
    """

    samples: int
    tokens: int | None
    flop: float


def check_finite(what: str, figures: dict[str, float]) -> None:
    """Raises AutoparError for a figure that is not a number or infinite: a file may hold those too."""
    for name, value in figures.items():
        if not math.isfinite(value):
            raise AutoparError(f"{name!r} of {what} is {value}, needed is a finite number: make the plan again")
