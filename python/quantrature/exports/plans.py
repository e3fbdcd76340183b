"""Convert a plan to the options of another tool, so that the tool quantizes each matrix as the plan says.

Only bits, group size and symmetry are exported. The other tool computes codes and scales with its own method.
Therefore the plan's predicted loss change applies only as far as that method is similar to the plan's.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from .._C import InvalidArgumentError
from ..methods import METHODS
from ..plan import Plan, PlanEntry, fusion_groups

_log = logging.getLogger(__name__)

Setting = tuple[int, int, bool]
"""Bits, group size and symmetry."""

FORMATS = {
    "gptq-dynamic": "GPTQModel: bits, group size and the regular expressions of dynamic, for its own kernels",
    "gptq-vllm": "GPTQModel for vLLM and SGLang: the same, limited to the settings that these engines load",
    "compressed-tensors": "llm-compressor and vLLM: config_groups and ignore of a quantization_config",
    "auto-round": "AutoRound: its layer_config",
    "llama.cpp": "llama-quantize: a --tensor-type option for each matrix",
}
"""Formats of ``plan export``, each with a one-line description."""

GPTQ_BITS = (2, 3, 4, 8)
GPTQ_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
"""Bits and group sizes for which GPTQModel and AutoRound have kernels for packed 32-bit words."""

VLLM_GPTQ_BITS = (4, 8)
VLLM_GPTQ_GROUPS = (-1, 32, 64, 128)
"""Bits and group sizes that vLLM loads from a GPTQ checkpoint, if they are symmetric."""

COMPRESSED_TENSORS_BITS = range(2, 9)
"""1 bit is left out, because its values differ from quantrature's."""

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Names that vLLM and SGLang give to fused matrices, and the names of the parts."""

EXPERT = re.compile(r"(.+\.experts)\.(\w+)\.(\d+)")
"""Names of expert matrices in quantrature: ``...experts.PROJECTION.NUMBER``."""

LLAMA_TYPES = {
    2: {"q2_k": 2.625},
    3: {"q3_k": 3.4375},
    4: {"q4_k": 4.5, "q4_0": 4.5, "q4_1": 5.0},
    5: {"q5_k": 5.5, "q5_0": 5.5, "q5_1": 6.0},
    6: {"q6_k": 6.5625},
    8: {"q8_0": 8.5},
}
"""Bits of a code to ggml types, preferred first, with their bits per weight."""

LLAMA_APART = 0.125
"""Largest difference, in bits per weight, between a ggml type and the plan entry."""

LLAMA_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""For Llama-like models, ends of names in transformers to tensor names in GGUF."""


def export_plan(plan: Plan, name: str) -> dict[str, Any] | str:
    """Convert a plan to the options of another tool.

    - ``gptq-dynamic``: for ``GPTQConfig``: ``bits``, ``group_size`` and ``sym`` of most matrices, and ``dynamic``,
      which names matrices that differ (``+:``) or stay unquantized (``-:``). If the parts of a fused matrix have the
      same setting, one pattern matches the parts and the fused name.
    - ``gptq-vllm``: the same for checkpoints to be loaded by vLLM or SGLang. These support only symmetric quantization
      with 4 or 8 bits, and need the same setting for the parts of a fused matrix and for all experts of a layer.
    - ``compressed-tensors``: a ``quantization_config`` with one group per setting. Matrices are listed by name, so
      that matrices outside the plan stay unquantized.
    - ``auto-round``: matrix to ``bits``, ``group_size``, ``sym`` and ``data_type``; unquantized matrices have 16 bits.
    - ``llama.cpp``: lines of ``--tensor-type TENSOR=TYPE``. A ggml type has a fixed group size. The type with the
      same bits is used whose size is within ``LLAMA_APART`` bits per weight of the entry's, so that the budget of the
      plan holds. Unquantized matrices become f16.

    The other tools split fused experts before they quantize them: ``...experts.gate_up_proj.3`` becomes
    ``...experts.3.gate_proj`` and ``...experts.3.up_proj``. For ``llama.cpp``, experts cannot be exported.

    Args:
        plan: the plan to convert.
        name: one of ``FORMATS``.

    Returns:
        An object for JSON; for ``llama.cpp``, text. If matrices that serving engines fuse have different settings, a
        warning is logged; for ``gptq-vllm`` this is an error.

    Raises:
        InvalidArgumentError: for the first entry that the format cannot express; the message names it and the reason.
    """
    if name not in FORMATS:
        raise InvalidArgumentError(f"[export] format must be one of {', '.join(FORMATS)}: got {name!r}")
    if name not in ("llama.cpp", "gptq-vllm"):
        _warn_of_what_is_fused(plan)
    return _WRITERS[name](plan)


def to_text(exported: dict[str, Any] | str) -> str:
    """Return the result of :func:`export_plan` as the text of a file."""
    return exported if isinstance(exported, str) else json.dumps(exported, indent=2) + "\n"


def _gptq(plan: Plan) -> dict[str, Any]:
    return _dynamic("gptq-dynamic", _settings(plan, "gptq-dynamic", GPTQ_BITS, GPTQ_GROUPS))


def _gptq_vllm(plan: Plan) -> dict[str, Any]:
    settings = _settings(plan, "gptq-vllm", VLLM_GPTQ_BITS, VLLM_GPTQ_GROUPS)
    for name, entry in plan:
        if not entry.keeps and not entry.sym:
            _refuse("gptq-vllm", name, "sym must be true", entry.sym)
    for members in _joined(settings).values():
        for name in members:
            if settings[name] != settings[members[0]]:
                rule = f"it must have the same setting as {members[0]}, with which it is fused when the model is loaded"
                _refuse("gptq-vllm", name, rule, plan.entries[name])
    return _dynamic("gptq-vllm", settings)


def _dynamic(form: str, settings: dict[str, Setting | None]) -> dict[str, Any]:
    """Return the most frequent setting, and patterns for the matrices with other settings."""
    quantized = [setting for setting in settings.values() if setting is not None]
    if not quantized:
        raise InvalidArgumentError(f"[export] {form} needs an entry that is quantized: got none")
    most = max(quantized, key=quantized.count)
    dynamic: dict[str, Any] = {}
    for (parent, fused), members in _joined(settings).items():
        alike = len({settings[name] for name in members}) == 1
        for name in members[:1] if alike else members:
            setting = settings[name]
            if not alike or not fused:
                pattern = f"^{_pattern(name)}$"
            elif fused == "experts":
                pattern = rf"^{re.escape(parent)}(?:\.\d+\.\w+)?$"
            else:
                leaves = [each.rpartition(".")[2] for each in members]
                pattern = rf"^{re.escape(parent)}\.(?:{'|'.join([*leaves, fused])})$"
            if setting is None:
                dynamic[f"-:{pattern}"] = {}
            elif setting != most:
                dynamic[f"+:{pattern}"] = _named(setting)
    return {**_named(most), "dynamic": dynamic}


def _joined(names: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """Group matrices by what engines fuse them to: module and fused name, or ``experts``, or the matrix itself."""
    fused_name = {part: fused for fused, parts in FUSED.items() for part in parts}
    found: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        expert = EXPERT.fullmatch(name)
        key = (parent, fused_name[leaf]) if leaf in fused_name else (name, "")
        if expert:
            key = (expert[1], "experts")
        found.setdefault(key, []).append(name)
    return found


def _names_elsewhere(name: str) -> list[str]:
    """Return the names of a matrix in other tools, where each expert is a layer and projections are not fused."""
    expert = EXPERT.fullmatch(name)
    if expert is None:
        return [name]
    return [f"{expert[1]}.{expert[3]}.{part}" for part in FUSED.get(expert[2], (expert[2],))]


def _pattern(name: str) -> str:
    """Return a regular expression for the names of a matrix in other tools."""
    names = _names_elsewhere(name)
    if len(names) == 1:
        return re.escape(names[0])
    parent = names[0].rpartition(".")[0]
    return rf"{re.escape(parent)}\.(?:{'|'.join(each.rpartition('.')[2] for each in names)})"


def _compressed_tensors(plan: Plan) -> dict[str, Any]:
    settings = _settings(plan, "compressed-tensors", COMPRESSED_TENSORS_BITS, None)
    groups: dict[Setting, list[str]] = {}
    for name, setting in settings.items():
        if setting is not None:
            groups.setdefault(setting, []).append(name)
    ignore = [each for name, setting in settings.items() if setting is None for each in _names_elsewhere(name)]
    patterns = {setting: [f"re:^{_pattern(name)}$" for name in names] for setting, names in groups.items()}
    return pack_quantized(patterns, ignore + ["lm_head"] * ("lm_head" not in settings))


def pack_quantized(targets: Mapping[Setting, list[str]], ignore: list[str]) -> dict[str, Any]:
    """Return the ``quantization_config`` of compressed-tensors, format pack-quantized.

    Args:
        targets: for each setting, regular expressions for the names of its matrices, with ``re:`` in front.
        ignore: names of layers that stay unquantized.
    """
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{k}": {
                "targets": names,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": sym,
                    "strategy": "channel" if group_size == -1 else "group",
                    "group_size": None if group_size == -1 else group_size,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for k, ((bits, group_size, sym), names) in enumerate(sorted(targets.items()))
        },
        "ignore": ignore,
    }


def _auto_round(plan: Plan) -> dict[str, Any]:
    settings = _settings(plan, "auto-round", GPTQ_BITS, GPTQ_GROUPS)
    return {
        each: {"bits": 16} if setting is None else {**_named(setting), "data_type": "int"}
        for name, setting in settings.items()
        for each in _names_elsewhere(name)
    }


def _llama_cpp(plan: Plan) -> str:
    lines = []
    for name, entry in plan:
        found = re.search(r"(?:^|\.)layers\.(\d+)\.(.+)$", name)
        tensor = LLAMA_TENSORS.get(found[2]) if found else None
        if found is None or tensor is None:
            _refuse("llama.cpp", name, "its tensor name in GGUF is only known for Llama-like models", name)
        lines.append(f"--tensor-type blk.{found[1]}.{tensor}.weight={_llama_type(name, entry)}\n")
    return "".join(lines)


def _llama_type(name: str, entry: PlanEntry) -> str:
    """Return the ggml type for an entry."""
    if entry.keeps:
        return "f16"
    _demand_a_grid_alone("llama.cpp", name, entry)
    types = LLAMA_TYPES.get(entry.bits, {})
    if not types:
        _refuse("llama.cpp", name, f"bits must be one of {', '.join(map(str, LLAMA_TYPES))}", entry.bits)
    parameters = 0 if entry.group_size == -1 else (entry.meta_bits or 16) * (1 if entry.sym else 2) / entry.group_size
    stored = entry.bits + parameters
    # Symmetric grids of 32 are the types that end in _0; other ties go to the first, which is the best of its size.
    plain = f"q{entry.bits}_0"
    if entry.sym and entry.group_size == 32 and plain in types:
        return plain
    nearest = min(types, key=lambda kind: abs(types[kind] - stored))
    if abs(types[nearest] - stored) > LLAMA_APART:
        sizes = ", ".join(f"{kind} {bits:g}" for kind, bits in types.items())
        rule = f"group_size must give one of the sizes of {entry.bits}-bit types ({sizes} bits per weight)"
        _refuse("llama.cpp", name, rule, f"{entry.group_size}, {stored:g} bits per weight")
    return nearest


def _warn_of_what_is_fused(plan: Plan) -> None:
    """Log one warning with the matrices that serving engines fuse, but that have different settings."""
    names = list(plan.entries)
    for members in fusion_groups(names):
        fused = [names[i] for i in members]
        if len({(plan.entries[name].setting, plan.entries[name].sym) for name in fused}) > 1:
            _log.warning(
                "%s have different settings, but vLLM and SGLang fuse them and will not load them", ", ".join(fused)
            )
            return


def _settings(
    plan: Plan, form: str, bits: tuple[int, ...] | range, group_sizes: tuple[int, ...] | None
) -> dict[str, Setting | None]:
    """Return bits, group size and symmetry of each entry; ``None`` for unquantized matrices.

    Raises:
        InvalidArgumentError: for an entry that the format cannot express.
    """
    settings: dict[str, Setting | None] = {}
    for name, entry in plan:
        settings[name] = None if entry.keeps else (entry.bits, entry.group_size, entry.sym)
        if entry.keeps:
            continue
        _demand_a_grid_alone(form, name, entry)
        if form != "compressed-tensors" and not re.search(r"\.\d+(\.|$)", name):
            _refuse(form, name, "only matrices inside the blocks can be quantized", name)
        if entry.meta_bits is not None:
            _refuse(form, name, "meta_bits must be null", entry.meta_bits)
        if entry.bits not in bits:
            _refuse(form, name, f"bits must be one of {', '.join(map(str, bits))}", entry.bits)
        if group_sizes is not None and entry.group_size not in group_sizes:
            _refuse(form, name, f"group_size must be one of {', '.join(map(str, group_sizes))}", entry.group_size)
    return settings


def _demand_a_grid_alone(form: str, name: str, entry: PlanEntry) -> None:
    method = METHODS[entry.method]
    if not method.uniform:
        _refuse(form, name, "method must be one with evenly spaced values", entry.method)
    if entry.outlier_fraction:
        _refuse(form, name, "outlier_fraction must be 0", entry.outlier_fraction)


def _refuse(form: str, name: str, rule: str, got: object) -> NoReturn:
    raise InvalidArgumentError(f"[export] {form} cannot express entry {name!r}: {rule}: got {got}")


def _named(setting: Setting) -> dict[str, Any]:
    return dict(zip(("bits", "group_size", "sym"), setting, strict=True))


_WRITERS: dict[str, Callable[[Plan], dict[str, Any] | str]] = {
    "gptq-dynamic": _gptq,
    "gptq-vllm": _gptq_vllm,
    "compressed-tensors": _compressed_tensors,
    "auto-round": _auto_round,
    "llama.cpp": _llama_cpp,
}
