"""Find the matrices that serving engines fuse into one matrix, and that must therefore have the same setting."""

from __future__ import annotations

from collections.abc import Iterable

_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv"),
    **dict.fromkeys(("query", "key", "value"), "qkv"),
    **dict.fromkeys(("q", "k", "v"), "qkv"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up"),
    **dict.fromkeys(("w1", "w3"), "gate_up"),
    **dict.fromkeys(("wi_0", "wi_1"), "gate_up"),
}


def fusion_groups(names: Iterable[str]) -> list[list[int]]:
    """Return groups of indices of matrices that must share one setting, in the order of their first members.

    A group is q, k and v of an attention, or gate and up of an MLP (of one expert, in a mixture of experts).
    """
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        parent, _, leaf = name.rpartition(".")
        expert = ""
        if leaf.isdigit():
            expert = leaf
            parent, _, leaf = parent.rpartition(".")
        groups.setdefault(f"{parent}.{_FUSED.get(leaf, leaf)}.{expert}", []).append(i)
    return list(groups.values())
