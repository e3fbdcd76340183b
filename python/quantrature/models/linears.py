"""Find the weight matrices of a model that can be quantized.

Blocks are found by structure, not by a list of architectures: every outermost ``nn.ModuleList`` whose members contain
linear layers is a stack of blocks (an encoder-decoder has two). Embeddings, the output embedding, norms, routers and
all layers outside the blocks are not quantized by default. Each matrix that is skipped is listed with the reason.

Since transformers 5, the experts of a mixture are not modules but slices of one three-dimensional parameter. Here each
slice is a matrix of its own, named after the parameter and the index of the expert
(``model.layers.0.mlp.experts.down_proj.3``).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .._C import InvalidArgumentError
from ..plan.matching import matching
from .watch import weights_in_use


@dataclass(frozen=True)
class LinearWeight:
    """One weight matrix that can be quantized, and the parameter that holds it.

    Attributes:
        name: full module name (``model.layers.0.self_attn.q_proj``); for an expert the parameter and the expert's
            index (``model.layers.0.mlp.experts.down_proj.3``).
        role: the name inside its block, the same in every block (``self_attn.q_proj``, ``mlp.experts.down_proj``).
        block: index of the block within its stack; -1 for the token embedding and the output embedding.
        out_features: number of rows of :attr:`weight`.
        in_features: number of columns of :attr:`weight`; groups are consecutive columns.
        bias: whether the layer has a bias, which is never quantized.
        module: the module that holds the parameter: an experts module for an expert, an ``nn.Embedding`` for a token
            embedding.
        attribute: the parameter's name in ``module``.
        transposed: whether the parameter is stored as (in_features, out_features), as in GPT-2.
        expert: index along the first dimension of a parameter with all experts; ``None`` if the parameter holds only
            this matrix.
        aliases: other names under which the model uses the same weight.
    """

    name: str
    role: str
    block: int
    out_features: int
    in_features: int
    bias: bool
    module: nn.Module
    attribute: str = "weight"
    transposed: bool = False
    expert: int | None = None
    aliases: tuple[str, ...] = ()

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as the model stores it; for an expert, the parameter with all experts."""
        return self.module.get_parameter(self.attribute)

    @property
    def weight(self) -> torch.Tensor:
        """The matrix, (out_features, in_features), detached; it shares memory with the model."""
        stored = getattr(self.module, self.attribute)
        if isinstance(stored, nn.ModuleList):  # the experts were split into layers
            own: torch.Tensor = stored[self.expert or 0].get_parameter("weight")
            return own.detach()
        return self.view(self.parameter.detach())

    @property
    def layer(self) -> nn.Module:
        """The module that is called with the inputs of the matrix.

        For an expert it is the expert's own layer, or the experts module if the experts are not split into layers.
        """
        stored = getattr(self.module, self.attribute)
        return stored[self.expert or 0] if isinstance(stored, nn.ModuleList) else self.module

    @property
    def in_block(self) -> bool:
        """Whether the matrix is part of a block: false for the token embedding and the output embedding."""
        return self.block >= 0

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this matrix's part of a tensor shaped like :attr:`parameter`, in the order of the parameter."""
        return tensor if self.expert is None else tensor[self.expert]

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this matrix's part of a tensor shaped like :attr:`parameter`, such as a gradient.

        Returns:
            A view of shape (out_features, in_features); not contiguous if :attr:`transposed`.
        """
        matrix = self.stored(tensor)
        return matrix.mT if self.transposed else matrix


@dataclass(frozen=True)
class Skipped:
    """A weight that is not quantized.

    Attributes:
        name: name of the module; if the module is not a linear layer, name of the parameter.
        shape: shape of the parameter; for a matrix in ``ignore``, (out_features, in_features).
        reason: short reason.
    """

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Linears(Sequence[LinearWeight]):
    """The result of :func:`find_linears`: a sequence of matrices in model order, and what was skipped.

    Attributes:
        matrices: the quantizable matrices.
        skipped: every other parameter of two or more dimensions, except biases of experts.
        stacks: names of the module lists that hold the blocks.
    """

    matrices: tuple[LinearWeight, ...]
    skipped: tuple[Skipped, ...]
    stacks: tuple[str, ...]

    def __len__(self) -> int:
        """Number of quantizable matrices."""
        return len(self.matrices)

    def __iter__(self) -> Iterator[LinearWeight]:
        """Iterate over the matrices in model order."""
        return iter(self.matrices)

    @overload
    def __getitem__(self, index: int) -> LinearWeight: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LinearWeight]: ...
    def __getitem__(self, index: int | slice) -> LinearWeight | Sequence[LinearWeight]:
        """Return the matrix at an index, or the matrices in a slice."""
        return self.matrices[index]

    def find(self, name: str) -> LinearWeight:
        """Return the matrix with a name or alias.

        Raises:
            InvalidArgumentError: if there is none; the message says why the name was skipped, if it was.
        """
        if name in self._by_name:
            return self._by_name[name]
        why = next((s.reason for s in self.skipped if s.name == name), "the model has no such matrix")
        raise InvalidArgumentError(
            f"[find_linears] name must be the name of a quantizable matrix: got name={name} ({why})"
        )

    @functools.cached_property
    def _by_name(self) -> dict[str, LinearWeight]:
        return {name: linear for linear in self.matrices for name in (linear.name, *linear.aliases)}


def check_loaded(op: str, linears: Iterable[LinearWeight]) -> None:
    """Check that the values of all matrices are loaded.

    Raises:
        InvalidArgumentError: if a matrix is on the meta device, as with Accelerate's offloading; the message names it.
    """
    for linear in linears:
        if linear.parameter.is_meta:
            raise InvalidArgumentError(
                f"[{op}] {linear.name} must be on a device: it is offloaded to disk or CPU memory; choose device_map "
                "and max_memory so that the whole model fits on the devices"
            )


def check_dense(op: str, config: Any) -> None:
    """Check that a configuration is of a model that is not quantized yet.

    Raises:
        InvalidArgumentError: if it is quantized; the message names the folder and the method.
    """
    about = getattr(config, "quantization_config", None)
    if about is not None:
        method = about.get("quant_method") if isinstance(about, dict) else getattr(about, "quant_method", None)
        name = getattr(config, "_name_or_path", "") or "the model"
        raise InvalidArgumentError(
            f"[{op}] {name} is quantized already, by {getattr(method, 'value', method)}: give the original model "
            "instead"
        )


def find_linears(
    model: nn.Module,
    ignore: str | Iterable[str] = (),
    *,
    experts: bool = True,
    embeddings: bool = False,
    watch: bool = True,
) -> Linears:
    """Find the weight matrices of a model that can be quantized.

    These are the ``nn.Linear`` and GPT-2 ``Conv1D`` layers and the fused experts inside the blocks of a language model
    or encoder. The values of the weights are not read, so the model may be on the meta device. The result depends only
    on the model's structure and code. The following are skipped, and listed in ``skipped`` with the reason:

    - embeddings, the output embedding, and weights tied to either;
    - routers of mixtures, and layers that the model's class keeps in float32 (T5's ``wo``);
    - layers outside the blocks (heads, projections), and towers that do not read text;
    - linear layers with a forward of their own, and parameters of unknown layout;
    - layers whose weight the model's code uses directly, without calling the layer (Mamba's ``dt_proj``).

    Args:
        model: a transformers model, or any module whose blocks are in an ``nn.ModuleList``.
        ignore: names and patterns to skip. A name selects itself and every module inside it. A pattern is ``re:`` and
            a regular expression, which must match from the beginning of the full name, as in compressed-tensors.
        experts: whether to return fused experts, one matrix each; otherwise they are skipped.
        embeddings: whether to return the token embedding and the output embedding, too; as one matrix if they are tied.
        watch: whether to run the model's code on a few tokens, without its weights, to find layers whose weight it uses
            directly. If false, or if the model does not run on token ids alone, such layers are not detected.

    Raises:
        InvalidArgumentError: for an entry of ``ignore`` that matches nothing or is not a regular expression, for a
            model that is quantized already, and for a model without blocks that contain linear layers.
    """
    quantized = next((name for name, module in model.named_modules() if getattr(module, "holds_codes", False)), None)
    if quantized is not None:
        raise InvalidArgumentError(
            f"[find_linears] the model is quantized already ({quantized}): give the original model instead"
        )
    walk = _Walk(model, embeddings)
    if not walk.stacks:
        raise InvalidArgumentError(
            f"[find_linears] a model needs blocks with linear layers in an nn.ModuleList: got {type(model).__name__}"
        )
    table = walk.table  # visited first, so that weights tied to it, which may come earlier, become its aliases
    for name, module in [*([(table, walk.modules[table])] if table else []), *walk.modules.items()]:
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.ndim > 1:
                walk.visit(name, module, attribute, parameter, experts)
    if watch:
        walk.leave_out_weights_in_use(model)
    return _without(walk, [ignore] if isinstance(ignore, str) else list(ignore))


IN_USE = "the model's code uses or changes this weight directly, without calling the layer"


class _Walk:
    """State of the search: facts about the whole model, and the matrices found so far."""

    def __init__(self, model: nn.Module, embeddings: bool) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.stacks = _stacks(self.modules)
        self.matrices: dict[str, LinearWeight] = {}
        self.skipped: list[Skipped] = []
        self._first: dict[int, list[str]] = {}  # identity of a parameter to its matrices; later names become aliases
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        # On the meta device, and before a checkpoint is loaded, tied weights can still be separate parameters.
        self._tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        self._embeddings: dict[int, str] = {}
        for name, module in self.modules.items():
            if isinstance(module, nn.Embedding):
                self._embeddings.setdefault(self._identity(f"{name}.weight", module.weight), name)
        self._output = _embedding_of(model, "get_output_embeddings")
        self._input = _embedding_of(model, "get_input_embeddings") if embeddings else None
        # Marian has several embedding modules with the same weight.
        self._table = self._identity_of(self._input) if isinstance(self._input, nn.Embedding) else None
        self.table = "" if self._table is None else self._embeddings[self._table]
        self._with_embeddings = embeddings
        # T5 casts the inputs of such a layer to the dtype of its weight.
        self._wide: list[str] = [
            kept
            for names in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
            for kept in getattr(model, names, None) or ()
        ]
        self._foreign = {stack: _foreign_tower(self.modules, stack) for stack in self.stacks}

    def visit(self, name: str, module: nn.Module, attribute: str, parameter: nn.Parameter, experts: bool) -> None:
        """Add one parameter to the matrices or to the skipped ones."""
        path = f"{name}.{attribute}" if name else attribute
        identity = self._identity(path, parameter)
        label = name if attribute == "weight" and name else path
        known = self._first.get(identity)
        if known is not None:
            for first in known:
                linear = self.matrices[first]
                alias = label if linear.expert is None else f"{label}.{linear.expert}"
                if alias == first:
                    continue
                self.matrices[first] = replace(linear, aliases=(*linear.aliases, alias))
            return
        found = self._classify(name, module, attribute, parameter, identity, experts)
        if isinstance(found, str):
            if name == self.table and any(skipped.name == label for skipped in self.skipped):
                return
            self.skipped.append(Skipped(label, tuple(parameter.shape), found))
            return
        self._first[identity] = [linear.name for linear in found]
        self.matrices.update((linear.name, linear) for linear in found)

    def _classify(
        self, name: str, module: nn.Module, attribute: str, parameter: nn.Parameter, identity: int, experts: bool
    ) -> list[LinearWeight] | str:
        """Return the matrices of a parameter, or the reason to skip it."""
        if isinstance(module, nn.Embedding):
            if identity != self._table:
                return "embedding"
            return self._hinders(module, identity) or [_outside(name, module)]
        if identity in self._embeddings:
            return f"tied to {self._embeddings[identity]}"
        if module is self._output:
            return [_outside(name, module)] if self._with_embeddings and _is_plain(module) else "output embedding"
        stack = next((s for s in self.stacks if name.startswith(s + ".")), None)
        if stack is None:
            return "outside the blocks"
        if self._foreign[stack]:
            return self._foreign[stack]
        number, _, role = name[len(stack) + 1 :].partition(".")
        if self._is_router(name, role):
            return "router"
        if any(f".{kept}." in f".{name}." for kept in self._wide):
            return "kept in float32 by the model's code, which depends on its dtype"
        if isinstance(module, nn.Linear | Conv1D) and attribute == "weight":
            kind: Any = type(module)
            if not _acts_as_linear(kind):
                return f"{kind.__name__} is a linear layer with a forward of its own"
            transposed = isinstance(module, Conv1D)
            out_features, in_features = parameter.mT.shape if transposed else parameter.shape
            bias = module.bias is not None
            return [
                LinearWeight(name, role, int(number), out_features, in_features, bias, module, transposed=transposed)
            ]
        stored = _expert_layout(module)
        if stored is None:
            return f"{type(module).__name__} is not a linear layer"
        if attribute.endswith("_bias"):
            return []
        if parameter.ndim != 3:
            return f"not one matrix for each expert of {type(module).__name__}"
        if not experts:
            return "fused experts"
        transposed = stored == "transposed"
        out_features, in_features = parameter.shape[:0:-1] if transposed else parameter.shape[1:]
        of_all = LinearWeight(
            name=f"{name}.{attribute}",
            role=f"{role}.{attribute}",
            block=int(number),
            out_features=out_features,
            in_features=in_features,
            bias=getattr(module, f"{attribute}_bias", None) is not None,
            module=module,
            attribute=attribute,
            transposed=transposed,
        )
        return [replace(of_all, name=f"{of_all.name}.{i}", expert=i) for i in range(parameter.shape[0])]

    def leave_out_weights_in_use(self, model: nn.Module) -> None:
        """Move matrices that the model's code uses directly from the matrices to the skipped ones."""
        mine = {name for linear in self.matrices.values() for name in (linear.name, *linear.aliases)}
        layers = {
            name: module
            for name, module in self.modules.items()
            if _is_plain(module) or isinstance(module, Conv1D) or (isinstance(module, nn.Embedding) and name in mine)
        }
        used = weights_in_use(model, layers)
        for linear in list(self.matrices.values()):
            if not used.isdisjoint((linear.name, *linear.aliases)):
                del self.matrices[linear.name]
                self.skipped.append(Skipped(linear.name, tuple(linear.parameter.shape), IN_USE))

    def _hinders(self, embedding: nn.Embedding, identity: int) -> str:
        """Return the reason why a token embedding cannot be quantized; '' if it can."""
        if small_embedding(embedding) is None:
            return f"{type(embedding).__name__} is an embedding with a forward of its own"
        for name, module in self.modules.items():
            weight = getattr(module, "weight", None)
            tied = isinstance(weight, nn.Parameter) and self._identity(f"{name}.weight", weight) == identity
            if tied and not (_is_plain(module) or type(module) is type(embedding)):
                return f"tied to {name}, which is neither a linear layer nor such an embedding"
        return ""

    def _identity_of(self, embedding: nn.Module) -> int:
        name = next(name for name, module in self.modules.items() if module is embedding)
        return self._identity(f"{name}.weight", embedding.get_parameter("weight"))

    def _identity(self, path: str, parameter: torch.Tensor) -> int:
        """Return a number that is the same for parameters that are, or will be, tied."""
        return id(self._parameters.get(self._tied.get(path, path), parameter))

    def _is_router(self, name: str, role: str) -> bool:
        """Return whether a module decides which experts a token uses, or how much of the shared expert."""
        if re.search(r"router|expert\w*gate", role):
            return True
        parts = name.split(".")
        for i in range(len(parts) - role.count(".") - 1, len(parts)):
            if parts[i] == "gate":  # a module named gate is a router only if it has experts as siblings
                siblings = self.modules[".".join(parts[:i])].named_children()
                return any("expert" in sibling for sibling, _ in siblings)
        return False


def _stacks(modules: dict[str, nn.Module]) -> tuple[str, ...]:
    """Return the names of the outermost module lists whose members contain linear layers."""
    found: list[str] = []
    for name, module in modules.items():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(stack + ".") for stack in found):
            continue
        if any(not _is_linear(m) and any(_is_linear(inner) for inner in m.modules()) for m in module):
            found.append(name)
    return tuple(found)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D) or _expert_layout(module) is not None


@functools.cache
def _acts_as_linear(kind: Any) -> bool:
    """Return whether a class computes the same as its base class, so that a quantized linear layer can replace it.

    A class with a forward of its own is tested on a small layer: Falcon's passes the test, Llama 4's router does not.
    """
    if kind.forward in (nn.Linear.forward, Conv1D.forward):
        return True
    with torch.device("meta"):  # draws no random numbers
        small: nn.Module = nn.Linear(3, 2) if issubclass(kind, nn.Linear) else Conv1D(2, 3)
    small.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.copy_(torch.arange(1.0, parameter.numel() + 1, device="cpu").view_as(parameter))
        x = torch.arange(6.0, device="cpu").view(2, 3)
        try:
            return torch.equal(kind.forward(small, x), small(x))
        except Exception:  # its forward needs more attributes than a linear layer has
            return False


def _expert_layout(module: nn.Module) -> str | None:
    """Return how a module stores fused experts: 'plain' (experts, out, in) or 'transposed'; ``None`` if it has none.

    transformers marks the modules whose forward it can replace. For others the shapes are compared: the last projection
    must have as many outputs as the first ones have inputs.
    """
    down = getattr(module, "down_proj", None)
    if not isinstance(down, nn.Parameter) or down.ndim != 3:
        return None
    if hasattr(module, "is_transposed"):
        return "transposed" if module.is_transposed else "plain"
    names = ("gate_up_proj", "gate_proj", "up_proj")
    first = [p.shape for p in (getattr(module, name, None) for name in names) if isinstance(p, nn.Parameter)]
    experts, a, b = down.shape
    if first and all(shape in ((experts, b, a), (experts, 2 * b, a)) for shape in first):
        return "plain"
    if first and all(shape in ((experts, b, a), (experts, b, 2 * a)) for shape in first):
        return "transposed"
    return None


def _is_plain(module: nn.Module) -> bool:
    kind: Any = type(module)
    return issubclass(kind, nn.Linear) and _acts_as_linear(kind)


def _embedding_of(model: Any, getter: str) -> Any:
    """Return the token embedding or output embedding of a model, if the model provides it."""
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None


def _outside(name: str, module: nn.Module) -> LinearWeight:
    """Return the matrix of a token embedding or an output embedding."""
    rows, cols = module.get_parameter("weight").shape
    return LinearWeight(name, name, -1, rows, cols, getattr(module, "bias", None) is not None, module)


def small_embedding(embedding: nn.Embedding) -> nn.Embedding | None:
    """Return an embedding of one row with the same forward as ``embedding``; ``None`` for an unknown class.

    Known are the plain class, and classes that multiply by a constant, as in Gemma and Bart.
    """
    kind: Any = type(embedding)
    if embedding.max_norm is not None:
        return None
    with torch.device("cpu"):
        if kind.forward is nn.Embedding.forward:
            return nn.Embedding(1, embedding.embedding_dim)
        factor: Any = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
        try:
            small: nn.Embedding = kind(1, embedding.embedding_dim, None, embed_scale=factor)
            if len(list(small.parameters())) > 1:  # T5Gemma 2 has an extra row for one token
                return None
            # Some classes keep the constant as a tensor, which is rounded if the model is loaded in bfloat16.
            factors = (factor, torch.tensor(factor, dtype=small.weight.dtype))
            with torch.no_grad():
                found = small(torch.tensor([0]))
                multiplies = any(torch.equal(found, small.weight * each) for each in factors)
        except Exception:  # its constructor takes other arguments
            return None
    return small if multiplies else None


def _foreign_tower(modules: dict[str, nn.Module], stack: str) -> str:
    """Return why a stack is not quantized: it belongs to a tower for images or sound. '' if it reads text."""

    def reads_text(module: nn.Module) -> bool:
        modalities = getattr(module, "input_modalities", "text")
        section = str(getattr(getattr(module, "config", None), "base_config_key", ""))
        return "text" in modalities and not re.search("vision|image|audio", section)

    parts = stack.split(".")
    for end in range(len(parts), 0, -1):
        tower = ".".join(parts[:end])
        if hasattr(modules[tower], "input_modalities"):
            foreign = reads_text(modules[""]) and not reads_text(modules[tower])
            return f"in {tower}, which does not read text" if foreign else ""
    return ""


def _without(walk: _Walk, ignore: list[str]) -> Linears:
    """Return the result of a search without what the entries of ``ignore`` match."""
    everything = [*walk.matrices, *(s.name for s in walk.skipped)]
    everything += [alias for linear in walk.matrices.values() for alias in linear.aliases]
    ignored: dict[str, str] = {}
    for entry in ignore:
        module = [entry] if entry in walk.modules else []
        matched = matching(entry, [*everything, *module], "[find_linears] an entry of ignore")
        ignored.update((name, entry) for name in matched)
    matrices = []
    skipped = list(walk.skipped)
    for linear in walk.matrices.values():
        by = [ignored[name] for name in (linear.name, *linear.aliases) if name in ignored]
        if by:
            skipped.append(Skipped(linear.name, (linear.out_features, linear.in_features), f"ignored by {by[0]}"))
        else:
            matrices.append(linear)
    return Linears(tuple(matrices), tuple(skipped), walk.stacks)
