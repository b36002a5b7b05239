"""BatchModule: M models of one architecture as one module."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import check_same_architecture
from .base import (
    AbstractBatchModule,
    StateDict,
    as_integer,
    batch_class_of,
    check_entries,
    check_state_dicts,
    entry_shapes,
    load_entries,
    merge_batch,
    model_state_dict,
    split_batch,
)
from .execution import PerModelOutputs, refusal, run_merged, run_one_by_one, run_under_vmap
from .layerwise import run_layerwise
from .pytree import extract_tensors, map_leaves, map_tensors
from .registered import batch_of, copy_requires_grad, entries_below, join_names
from .run_state import Inputs, Models, Rollback, RunLock, StoredAttributes
from .seeds import initialised_copies
from .shared import Shared
from .state import (
    Absent,
    copy_module,
    is_batch_module,
    named_tensors,
    plain_attributes,
    plain_modules,
    stack_tensors,
    walk,
)
from .torch_private import apply_to_tensors, load_own_entries, save_own_entries, share_contents


class BatchModule(AbstractBatchModule):
    """`batch` models like `module`, each with its own weights, as one module.

    Model m computes from its share of the input what `module` with its weights would compute, whatever its forward
    does. Submodules, parameters and buffers have the names that they have in `module`; parameters and buffers have a
    leading dimension M.

    Args:
        module: The module that all models start from. It stays as it is unless `inplace`.
        batch: M, the number of models; by default the number of `seeds`, or 1.
        inplace: Whether `module` becomes a part of the batch instead of being copied.
        seeds: M integers: model m is initialised as `module` would be after torch.manual_seed(seeds[m]).

    Raises:
        TypeError: `module` is not a module, or `seeds` are not iterable.
        ValueError: `batch` is less than 1, `batch` and `seeds` do not agree, or `module` contains a batch already.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batch = torchmb.BatchModule(net, seeds=range(3))
        >>> batch(torch.zeros(3, 5, 4)).shape  # 3 models, 5 rows each
        torch.Size([3, 5, 2])
        >>> batch.get_parameter("0.weight").shape
        torch.Size([3, 8, 4])
    """

    def __init__(
        self,
        module: nn.Module,
        batch: int | None = None,
        inplace: bool = False,
        *,
        seeds: Iterable[int] | None = None,
    ) -> None:
        _check_is_module("module", module)
        numbers = None if seeds is None else _check_seeds(seeds)
        if batch is None:
            batch = 1 if numbers is None else len(numbers)
        super().__init__(batch)
        if numbers is not None and len(numbers) != self.batch:
            raise ValueError(f"batch = {batch} models need as many seeds, got {len(numbers)}")
        self._build([module] * self.batch if numbers is None else initialised_copies(module, numbers))
        if inplace:
            module.__dict__.update(vars(self._template))
            self._adopt(module)

    @classmethod
    def from_modules(cls, modules: Iterable[nn.Module]) -> BatchModule:
        """Returns a batch of copies of existing models of one architecture, with their weights.

        The models may differ in the values of parameters and buffers only. Of what cannot be compared, the batch has
        what the first module has: hooks, the mode, and attributes other than numbers, strings, None and tuples of them.

        Args:
            modules: At least one module.

        Raises:
            TypeError: One of them is not a module.
            ValueError: There are none, or two differ in something else: types of submodules, names, shapes, dtypes,
                devices, ties or requires_grad of tensors, attributes.

        Example:
            >>> models = [nn.Linear(4, 2) for _ in range(3)]
            >>> batch = torchmb.BatchModule.from_modules(models)
            >>> torch.equal(batch.weight[1], models[1].weight)
            True
        """
        modules = list(modules)
        for i, module in enumerate(modules):
            _check_is_module(f"module {i}", module)
        if not modules:
            raise ValueError("from_modules needs at least 1 module, got 0")
        check_same_architecture(modules)
        self = cls.__new__(cls)
        AbstractBatchModule.__init__(self, len(modules))
        self._build(modules)
        return self

    def _build(self, modules: Sequence[nn.Module]) -> None:
        """Makes the template: the first module with the tensors of all, and with batch modules where registered."""
        self._plain: dict[str, nn.Module] = {}  # copies of registered modules, for `unstack`
        for name, module in modules[0].named_modules():
            if is_batch_module(module):
                raise ValueError(f"{name or 'the module'} is a {type(module).__name__}: a batch already")
        substitutes: dict[int, Any] = dict(stack_tensors(modules, batch_class_of))
        for name, module in walk(modules[0], batch_class_of):
            if cls := batch_class_of(module):
                self._plain[name] = copy_module(module)
                if id(module) not in substitutes:
                    substitutes[id(module)] = batch_of(cls, [m.get_submodule(name) for m in modules])
        self._adopt(copy_module(modules[0], substitutes))

    def _adopt(self, root: nn.Module) -> None:
        """Makes the contents of `root` the contents of this module, under the same names."""
        self._lock = RunLock()
        self._stored = StoredAttributes()
        self._refused = ""
        self.__dict__["_root"] = root  # not as a submodule: names would get a prefix
        share_contents(self, root)
        self.training = root.training

    def _batch_module(self, name: str) -> AbstractBatchModule:
        found = self._template.get_submodule(name)
        assert isinstance(found, AbstractBatchModule)
        return found

    @property
    def _template(self) -> nn.Module:
        root: nn.Module = self.__dict__["_root"]
        return root

    # An attribute that a forward sets on the root is found on the batch, as those of submodules are found on them.

    def __getattr__(self, name: str) -> Any:
        if self._is_of_root(name):
            return vars(self._template)[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_of_root(name):
            setattr(self._template, name, value)
        else:
            super().__setattr__(name, value)

    def _is_of_root(self, name: str) -> bool:
        """Whether it is a plain attribute of the root, and this module has none of that name."""
        own = self.__dict__
        return (
            "_root" in own
            and name not in own
            and not hasattr(type(self), name)
            and name in plain_attributes(self._template)
        )

    # The root's class may override the following methods, as BatchNorm does.

    def train(self, mode: bool = True) -> BatchModule:
        """Sets training or eval mode, for all models alike."""
        self.training = mode
        self._template.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> BatchModule:
        apply_to_tensors(self._template, fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        save_own_entries(self._template, destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        load_own_entries(self._template, *args)

    def forward(self, *args: Any, merge: bool = True, split: bool = True, **kwargs: Any) -> Any:
        """Runs all models, each on its share of the arguments. Threads that call one batch take turns.

        Args:
            *args: Arguments of the module's forward. Tensors are (M, B, …), or wrapped in `torchmb.shared`; anything
                else is the same for all models.
            merge: False if tensors are merged already: (B · M, …), index b * M + m.
            split: False if the output's tensors shall be merged.
            **kwargs: The same as `args`, by name.

        Returns:
            The output of the module's forward with tensors (M, B, …); a list of M outputs if they cannot be stacked.

        Raises:
            ValueError: A tensor's first dimension is not M (or not a multiple of M, if merged), or the output cannot be
                merged.

        Example:
            >>> batch = torchmb.BatchModule(nn.Linear(4, 2), batch=3)
            >>> batch(torchmb.shared(torch.zeros(5, 4))).shape
            torch.Size([3, 5, 2])
        """
        # torch.compile would trace into vmap, fail there, and leave the models to run one by one.
        compiling = torch.compiler.is_dynamo_compiling()
        run = torch.compiler.disable(self._run) if compiling else self._run  # type: ignore[no-untyped-call]
        output = run(self._inputs(args, kwargs, merged=not merge))
        if isinstance(output, PerModelOutputs):
            if not split:
                raise ValueError(
                    f"outputs of the {self.batch} models cannot be merged, since they cannot be stacked; "
                    "split=True returns a list"
                )
            return list(output)
        return output if split else map_tensors(merge_batch, output)

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any], merged: bool) -> Inputs:
        inputs = Inputs()

        def place(leaf: Any) -> Any:
            if isinstance(leaf, Shared):
                return leaf.value
            if not isinstance(leaf, Tensor):
                return leaf
            return inputs.add(split_batch(leaf, self.batch) if merged else self._checked(leaf))

        inputs.rest = map_leaves(place, (args, kwargs))
        return inputs

    def _checked(self, tensor: Tensor) -> Tensor:
        if tensor.dim() < 1 or tensor.shape[0] != self.batch:
            raise ValueError(
                f"a batch of {self.batch} models takes tensors ({self.batch}, B, ...), got {tuple(tensor.shape)}; "
                "wrap a tensor that all models share in torchmb.shared(...)"
            )
        return tensor

    def _run(self, inputs: Inputs) -> Any:
        with self._lock:  # the template holds the tensors of one run
            return self._run_alone(inputs)

    def _run_alone(self, inputs: Inputs) -> Any:
        if (output := run_layerwise(self._template, inputs, self.batch)) is not None:
            return output
        if isinstance(self._template, AbstractBatchModule):
            return run_merged(self._template, inputs)
        models = Models(self._template, self.batch, self._stored)
        if self._refused:
            return run_one_by_one(models, inputs)
        return self._try_vmap(models, inputs)

    def _try_vmap(self, models: Models, inputs: Inputs) -> Any:
        """Runs under vmap; if vmap refuses, model by model from the same state."""
        roll_back = Rollback(models, inputs)
        try:
            return run_under_vmap(models, inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if not roll_back():
                raise
            reason = refusal(error, self._template)
        output = run_one_by_one(models, inputs)  # outside `except`, so that the model's own error has no context
        self._refused = reason
        warnings.warn(
            f"the {self.batch} models of {type(self._template).__name__} run one by one, since vmap refuses {reason}",
            stacklevel=7,  # the line that calls the batch
        )
        return output

    def load_state_dicts(self, state_dicts: StateDict | Sequence[StateDict], strict: bool = True) -> None:
        """Loads state dicts of the original class; if one does not fit, none is loaded.

        Args:
            state_dicts: One for each model, or one for all.
            strict: Whether every state dict must have exactly the names of the module's own.

        Raises:
            TypeError: An entry for a tensor is not a tensor.
            ValueError: Their number, a shape or an extra state differs, or, when `strict`, a name.

        Example:
            >>> batch = torchmb.BatchModule(nn.Linear(4, 2), batch=3)
            >>> batch.load_state_dicts([nn.Linear(4, 2).state_dict() for _ in range(3)])
        """
        dicts, own = check_state_dicts(state_dicts, self.batch), self._own_state()
        shapes = entry_shapes(own, models=True)
        for name, plain in self._plain.items():
            below = entry_shapes(plain.state_dict(), models=False)
            shapes |= {join_names(name, key): shape for key, shape in below.items()}
        check_entries(shapes, dicts, strict)
        load_entries(self._template, own, dicts)
        for name, plain in self._plain.items():
            if plain.state_dict():
                self._batch_module(name).load_state_dicts([entries_below(state, name) for state in dicts], strict)

    def state_dicts(self) -> list[OrderedDict[str, Any]]:
        """Returns a state dict for each model, copied, that loads into the original class.

        Example:
            >>> batch = torchmb.BatchModule(nn.Linear(4, 2), batch=3)
            >>> nn.Linear(4, 2).load_state_dict(batch.state_dicts()[0])
            <All keys matched successfully>
        """
        own = self._own_state()
        dicts = [model_state_dict(own, i) for i in range(self.batch)]
        for name, plain in self._plain.items():
            if plain.state_dict():
                for state, below in zip(dicts, self._batch_module(name).state_dicts(), strict=True):
                    state.update({join_names(name, key): value for key, value in below.items()})
        return dicts

    def _own_state(self) -> StateDict:
        """The state dict without the entries of registered batch modules."""
        state = self.state_dict()
        for name in [n for n in state if any(n.startswith(join_names(outer, "")) for outer in self._plain)]:
            del state[name]
        return state

    def unstack(self, index: int) -> nn.Module:
        """Returns one model as a plain module of the original class, a copy.

        Args:
            index: The number of the model; negative numbers count from the end.

        Raises:
            IndexError: There is no such model.

        Example:
            >>> torchmb.BatchModule(nn.Linear(4, 2), batch=3).unstack(-1)
            Linear(in_features=4, out_features=2, bias=True)
        """
        if not -self.batch <= index < self.batch:
            raise IndexError(f"model {index} of {self.batch}")
        model = copy_module(self._template, self._parts_of_model(index))
        for module in model.modules():
            for name in [n for n, value in vars(module).items() if value is Absent]:
                delattr(module, name)
        return model

    def _parts_of_model(self, index: int) -> dict[int, Any]:
        """Maps the id of each tensor, batch module and stored attribute of the template to that of one model."""
        parts: dict[int, Any] = {}
        for tensor in named_tensors(self._template, is_batch_module).values():
            one = tensor[index].detach().clone()
            parts[id(tensor)] = nn.Parameter(one, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else one
        for name, plain in self._plain.items():
            batch_module = self._batch_module(name)
            parts[id(batch_module)] = module = copy_module(plain)
            if plain.state_dict():
                module.load_state_dict(batch_module.state_dicts()[index], assign=True)
            copy_requires_grad(batch_module, module)
        modules = plain_modules(self._template)
        shares = self._stored.of_model(modules, index)
        for name_in_module, value in self._stored.current(modules).items():
            if extract_tensors(value)[0] or name_in_module in self._stored.lists:
                parts[id(value)] = copy.deepcopy(map_tensors(lambda t: t.detach().clone(), shares[name_in_module]))
        return parts

    def extra_repr(self) -> str:
        """The class of one model, and M."""
        return f"{type(self._template).__name__}, batch={self.batch}"


def _check_is_module(name: str, value: Any) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {value!r}")


def _check_seeds(seeds: Any) -> list[int]:
    if not isinstance(seeds, Iterable):
        raise TypeError(f"seeds must be integers, one for each model, got {seeds!r}")
    return [as_integer("a seed", seed) for seed in seeds]
