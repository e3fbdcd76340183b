"""What a user wants of some matrices, whatever the strategy would choose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .._C import InvalidArgumentError
from ..plan.matching import matching
from ..plan.option import Option


@dataclass(frozen=True)
class Constraints:
    """Wishes by pattern (:func:`quantrature.plan.matching.matching`). If several cover a matrix, all of them hold.

    Attributes:
        pin: to bits (``4`` or ``"b4"``) or to bits and group size (``"b4g64"``).
        minimum, maximum: to bits.
        skip: matrices to leave as they are; they count in no budget.
    """

    pin: Mapping[str, int | str] = field(default_factory=dict)
    minimum: Mapping[str, int] = field(default_factory=dict)
    maximum: Mapping[str, int] = field(default_factory=dict)
    skip: Sequence[str] = ()

    def skipped(self, names: Sequence[str]) -> set[str]:
        """Names to leave as they are."""
        return {name for pattern in self.skip for name in matching(pattern, names, "[allocate] a constraint")}

    def allowed(self, names: Sequence[str], options: Sequence[Option]) -> dict[str, list[Option]]:
        """For each name the options that its constraints leave, a pinned group size among them where it is not.

        Raises:
            InvalidArgumentError: naming the matrix for which nothing is left.
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
                    raise InvalidArgumentError(f"[allocate] no setting is left for {name} by: {', '.join(why[name])}")

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
