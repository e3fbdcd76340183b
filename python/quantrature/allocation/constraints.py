"""Constraints on single matrices, which every strategy must follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .._C import InvalidArgumentError
from ..plan.matching import matching
from ..plan.option import Option


@dataclass(frozen=True)
class Constraints:
    """Constraints by matrix name or pattern (see :func:`quantrature.plan.matching.matching`).

    If several patterns match a matrix, all of their constraints apply.

    Attributes:
        pin: pattern to bits (``4`` or ``"b4"``) or to bits and group size (``"b4g64"``).
        minimum, maximum: pattern to the smallest and largest number of bits.
        skip: patterns of matrices that are not quantized and do not count in the budget.
    """

    pin: Mapping[str, int | str] = field(default_factory=dict)
    minimum: Mapping[str, int] = field(default_factory=dict)
    maximum: Mapping[str, int] = field(default_factory=dict)
    skip: Sequence[str] = ()

    def skipped(self, names: Sequence[str]) -> set[str]:
        """Return the names of matrices that are not quantized."""
        return {name for pattern in self.skip for name in matching(pattern, names, "[allocate] a constraint")}

    def allowed(self, names: Sequence[str], options: Sequence[Option]) -> dict[str, list[Option]]:
        """Return the allowed options of each matrix; a pinned group size is added to the options if necessary.

        Raises:
            InvalidArgumentError: if no option is left for a matrix; the message names it.
        """
        left = {name: list(options) for name in names}
        why: dict[str, list[str]] = {name: [] for name in names}

        def restrict(pattern: str, what: str, keep: Iterable[Option] | None, bits: range) -> None:
            for name in matching(pattern, names, "[allocate] a constraint"):
                if keep is not None:
                    left[name] = [o for o in left[name] if o in keep] if why[name] else list(keep)
                left[name] = [o for o in left[name] if o.bits in bits]
                why[name].append(f"{what} {pattern}")
                if not left[name]:
                    raise InvalidArgumentError(
                        f"[allocate] the constraints leave no setting for {name}: {', '.join(why[name])}"
                    )

        for pattern, wish in self.pin.items():
            option = Option.parse(str(wish))
            option.entry()  # refuses what no matrix can be stored as
            whole = "g" in str(wish)
            restrict(pattern, f"pin {wish} for", [option] if whole else None, range(option.bits, option.bits + 1))
        for pattern, least in self.minimum.items():
            restrict(pattern, f"at least {least} bits for", None, range(least, 9))
        for pattern, most in self.maximum.items():
            restrict(pattern, f"at most {most} bits for", None, range(0, most + 1))
        return left
