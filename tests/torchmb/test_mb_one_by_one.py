"""What vmap refuses runs model by model, as separate models would, from where the refused run began."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from models_harness import Own, close, compare_buffers, run_alike, separate
from torch import Tensor

from torchmb import BatchModule, shared


def branching(m: Any, x: Tensor) -> Tensor:
    y = m.n(m.l(x))
    return y * 2 if y.flatten()[0] > 0 else y - 1


def make() -> nn.Module:
    return Own(branching, l=nn.Linear(5, 4), n=nn.BatchNorm1d(4))


def test_a_data_dependent_branch_is_right_and_batch_norm_is_updated_once() -> None:
    models = separate(make, 7)
    batch = BatchModule.from_modules(models)
    with pytest.warns(UserWarning, match="one by one"):
        for _ in range(3):
            run_alike(batch, models, torch.randn(7, 6, 5))
    assert batch.n.num_batches_tracked.tolist() == [3] * 7


def test_one_warning_names_module_and_reason_and_is_not_repeated() -> None:
    batch, x = BatchModule(Own(lambda m, x: m.inner(x), inner=make()), 5), torch.randn(5, 6, 5)
    x[1] = -x[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            batch(x)
    (warning,) = caught
    assert "5 models of Own" in str(warning.message) and "inner" in str(warning.message)
    assert "differs between the models" in str(warning.message) and warning.filename == __file__


def test_a_buffer_that_only_some_models_replace_is_kept_by_the_others() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if x.flatten()[0] > 0:
            m.seen = m.seen + 1
        else:
            m.seen += 2
        return m.l(x) + m.seen

    def make() -> nn.Module:
        model = Own(forward, l=nn.Linear(5, 5))
        model.register_buffer("seen", torch.zeros(5))
        return model

    models = separate(make, 3)
    batch, x = BatchModule.from_modules(models), torch.randn(3, 6, 5)
    x[:, 0, 0] = torch.tensor([1.0, -1.0, 1.0])
    with pytest.warns(UserWarning, match="one by one"):
        for _ in range(2):
            run_alike(batch, models, x)


def test_a_branch_that_all_models_take_alike_needs_no_loop() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.l(x) if x.shape[0] > 1 and bool(x.isfinite().all()) else x

    models = separate(lambda: Own(forward, l=nn.Linear(5, 5)), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_alike(BatchModule.from_modules(models), models, torch.randn(3, 6, 5))


def test_random_numbers_are_drawn_as_if_the_refused_run_had_not_been() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        noise = torch.rand(4)
        return m.l(x) + noise if x.sum() > 0 else m.l(x) - noise

    batch, x = BatchModule(Own(forward, l=nn.Linear(5, 4)), 4), torch.randn(4, 6, 5)
    x[0], x[1] = x[0].abs(), -x[1].abs()
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="one by one"):
        first = batch(x)
    torch.manual_seed(3)
    assert torch.equal(first, batch(x))


def test_an_error_of_the_model_is_raised_as_it_is_and_not_remembered() -> None:
    batch = BatchModule(make(), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            batch(torch.randn(3, 6, 9))
    assert batch.n.num_batches_tracked.tolist() == [0, 0, 0]


def test_counters_and_lists_of_a_forward_count_once() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.calls, self.log = nn.Linear(5, 4), 0, ["start"]

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.log.append(f"call {self.calls}")
            return self.l(x) * (2 if x.sum() > 0 else 1) * self.calls

    models = separate(Counting, 5)
    batch = BatchModule.from_modules(models)
    with pytest.warns(UserWarning, match="one by one"):
        for _ in range(3):
            run_alike(batch, models, torch.randn(5, 6, 5))
    module = batch.unstack(0)
    assert module.calls == 3 and module.log == ["start", "call 1", "call 2", "call 3"]


def test_what_a_forward_keeps_for_the_next_is_each_models_own() -> None:
    class Recurrent(nn.Module):
        def __init__(self, branch: bool) -> None:
            super().__init__()
            self.l, self.branch = nn.Linear(4, 4), branch
            self.state: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.branch and x.sum() > 0:
                x = x * 2
            h = torch.zeros(4) if self.state is None else self.state
            self.state = torch.tanh(self.l(x).detach().sum(0) + h)
            return self.l(x) + h

    for branch in (False, True):
        models = separate(lambda branch=branch: Recurrent(branch), 5)  # type: ignore[misc]
        batch = BatchModule.from_modules(models)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if branch else "error")
            for _ in range(3):
                run_alike(batch, models, torch.randn(5, 6, 4))
        alone: Any = batch.unstack(1)
        close(alone.state.unsqueeze(0), [models[1].state], "state")


class Remembering(nn.Module):
    """Changes its attributes only where its input is positive; `log` is its layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 3)
        self.scale, self.peak = 1.0, torch.zeros(())
        self.log: list[float] = []
        self.nested: dict[str, list[float]] = {"log": []}
        self.l.log = self.log  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            self.log.append(x.sum().item())
            self.nested["log"].append(x.mean().item())
            self.scale *= 2
            self.peak = torch.maximum(self.peak, x.detach().max())
            if hasattr(self, "once"):
                del self.once
            else:
                self.once: float = x.mean().item()
        return self.l(x) * self.scale + self.peak + sum(self.nested["log"]) + len(self.l.log)  # type: ignore[arg-type]


def state_of(model: Any) -> tuple[Any, ...]:
    return model.log, model.nested, model.l.log, model.scale, model.peak.item(), getattr(model, "once", None)


@pytest.mark.parametrize("how", [lambda b: b, copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_an_attribute_that_only_some_models_change_is_each_models_own(how: Any) -> None:
    models = separate(Remembering, 3)
    batch = BatchModule.from_modules(models)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for signs in ([-1, 1, 1], [1, -1, 1], [-1, -1, -1], [1, 1, 1], [-1, 1, -1]):
            batch = how(batch)
            run_alike(batch, models, torch.rand(3, 6, 4) * torch.tensor(signs)[:, None, None])
            for i, model in enumerate(models):
                one = batch.unstack(i)
                assert state_of(one) == state_of(model)
                assert one.l.log is one.log and hasattr(one, "once") == hasattr(model, "once")
                one.log.append(1.0)  # of a copy


@pytest.mark.parametrize("branch_from", [1, 2, 3])
def test_a_tensor_in_an_attribute_that_a_forward_edits_in_place_is_each_models_own(branch_from: int) -> None:
    class Editing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.count, self.peak, self.fixed = 0, torch.zeros(()), torch.zeros(4), torch.ones(4)
            self.also_count = self.count
            self.state: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.count.add_(1)
            if self.state is None:
                self.state = x.detach().sum(0)
            else:
                self.state.add_(x.detach().sum(0))
            if self.calls >= branch_from and x.sum() > 0:
                self.peak.add_(x.detach().amax(0))
            return x + self.also_count + self.peak + self.state + self.fixed

    models = separate(Editing, 3)
    batch: Any = BatchModule.from_modules(models)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for signs in ([1, -1, 1], [-1, 1, 1], [1, -1, 1], [-1, -1, 1]):
            run_alike(batch, models, torch.rand(3, 6, 4) * torch.tensor(signs)[:, None, None])
    close(batch.peak, [m.peak for m in models], "peak")
    assert batch.fixed.shape == (4,)


def test_an_attribute_that_a_forward_resets_is_reset() -> None:
    class Resetting(nn.Module):
        state: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.state is not None:
                x, self.state = x + self.state, None
            else:
                self.state = x * (2 if x.sum() > 0 else 1)
            return x

    models = separate(lambda: nn.Sequential(Resetting()), 3)
    batch = BatchModule.from_modules(models)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4):
            run_alike(batch, models, torch.randn(3, 6, 4))


@pytest.mark.parametrize("branch", [False, True])
def test_what_two_modules_share_stays_shared(branch: bool) -> None:
    class Reading(nn.Module):
        def __init__(self, notes: dict[str, Tensor]) -> None:
            super().__init__()
            self.notes = notes

        def forward(self, x: Tensor) -> Tensor:
            return x + self.notes["x"]

    class Writing(Reading):
        def forward(self, x: Tensor) -> Tensor:
            self.notes["x"] = x * 2
            return x * (2 if branch and x.sum() > 0 else 1)

    def make() -> nn.Module:
        notes: dict[str, Tensor] = {}
        return nn.Sequential(Writing(notes), Reading(notes))

    models = separate(make, 3)
    batch = BatchModule.from_modules(models)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if branch else "error")
        for _ in range(3):
            run_alike(batch, models, torch.randn(3, 6, 4))


def test_an_error_leaves_buffers_and_attributes_as_they_were() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n: Any = nn.BatchNorm1d(4)
            self.state: Tensor | None = None
            self.log: list[int] = []

        def forward(self, x: Tensor, fail: bool = False) -> Tensor:
            y = self.n(x if self.state is None else x + self.state)
            self.state = y.detach() * (2 if x.sum() > 0 else 1)
            if x.sum() > 0:
                self.log.append(len(self.log))
            if fail and x.sum() > 0:
                raise ValueError("of the model's own")
            return y

    def state_of_batch() -> Any:
        f: Any = batch.f
        return copy.deepcopy((f.state, f.log, dict(f.n.named_buffers()), dict(f.n.named_parameters())))

    batch = BatchModule(Own(lambda m, x, fail=False: m.f(x, fail), f=Failing()), 3)
    x = torch.rand(3, 6, 4) * torch.tensor([-1, 1, 1])[:, None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for run in (lambda: None, lambda: batch(x)):
            run()
            before = state_of_batch()
            with pytest.raises(ValueError, match="of the model's own"):
                batch(x, fail=True)
            torch.testing.assert_close(state_of_batch(), before)
    assert before[0].shape == (3, 6, 4) and before[1] == [[], [0], [0]]


@pytest.mark.parametrize("how", [lambda b: b, copy.copy, copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_attributes_of_the_root_are_attributes_of_the_batch(how: Any) -> None:
    batch: Any = BatchModule(Feature(), 3)
    x = torch.randn(3, 6, 5)
    batch(x)
    batch = how(batch)
    close(batch.feature, [x[m] * 2 for m in range(3)], "feature")
    assert batch.batch == 3 and batch.calls == 1 and batch._template.batch == "of the model"
    batch.calls = 7
    batch(x)
    assert batch.calls == batch.unstack(1).calls == 8 and "calls" not in vars(batch)
    with pytest.raises(AttributeError, match="'BatchModule' object has no attribute 'other'"):
        _ = batch.other


class Feature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.batch = 0, "of the model"

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.feature = self.calls + 1, x * 2
        return self.feature


def test_a_numpy_step_in_the_forward_is_right() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.l(x) * float(x.detach().numpy().max())

    models = separate(lambda: Own(forward, l=nn.Linear(5, 4)), 3)
    with pytest.warns(UserWarning, match="one by one"):
        run_alike(BatchModule.from_modules(models), models, torch.randn(3, 6, 5))


def test_an_edit_in_place_of_what_models_share_is_right() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        total = torch.zeros(4)
        total += m.l(x).sum(0)
        return total

    models = separate(lambda: Own(forward, l=nn.Linear(5, 4)), 3)
    with pytest.warns(UserWarning, match="one by one"):
        run_alike(BatchModule.from_modules(models), models, torch.randn(3, 6, 5))


@pytest.mark.parametrize(
    "view", [lambda y: y.view(-1), lambda y: y.reshape(-1), lambda y: y.flatten(1), lambda y: y.contiguous()]
)
def test_a_view_edited_in_place_changes_what_it_is_a_view_of(view: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.c(x)
        view(y).mul_(2)
        return y

    models = separate(lambda: Own(forward, c=nn.Conv2d(2, 3, 3)), 3)
    with pytest.warns(UserWarning, match="one by one"):
        run_alike(BatchModule.from_modules(models), models, torch.randn(3, 4, 2, 6, 6))


def test_a_view_may_be_edited_in_place_if_it_is_all_that_is_left() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.c(x).flatten(1)
        y += 1
        y = F.relu(y.view(-1, 6), inplace=True)
        return m.l(y)

    models = separate(lambda: Own(forward, c=nn.Conv2d(2, 3, 3), l=nn.Linear(6, 2)), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_alike(BatchModule.from_modules(models), models, torch.randn(3, 4, 2, 6, 6))


def test_packed_sequences_are_right() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2, 1]), batch_first=True)
        return m.l(packed)[1]

    models = separate(lambda: Own(forward, l=nn.GRU(5, 4, batch_first=True)), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_alike(BatchModule.from_modules(models), models, torch.randn(3, 3, 3, 5))


@pytest.mark.parametrize("layer", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_that_ran_model_by_model_can_be_copied(layer: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.l(x * (2 if x.sum() > 0 else 1))[0]

    batch, x = BatchModule(Own(forward, l=layer(5, 4)), 3), torch.rand(3, 3, 2, 5) - torch.arange(3).view(3, 1, 1, 1)
    with pytest.warns(UserWarning, match="one by one"):
        expected = batch(x)
    torch.testing.assert_close(copy.deepcopy(batch)(x), expected)
    torch.testing.assert_close(batch.unstack(1)(x[1]), expected[1])
    assert pickle.dumps(batch.l)


def test_outputs_that_cannot_be_stacked_are_a_list() -> None:
    batch = BatchModule(Own(lambda m, x: x[x > 0]), 2)
    with pytest.warns(UserWarning, match="one by one"):
        out = batch(torch.tensor([[1.0, -1.0], [1.0, 2.0]]))
    assert type(out) is list and [o.tolist() for o in out] == [[1.0], [1.0, 2.0]]


def test_outputs_that_cannot_be_stacked_cannot_be_merged() -> None:
    batch = BatchModule(Own(lambda m, x: x[x[:, 0] > 0]), 2)
    with (
        pytest.warns(UserWarning, match="one by one"),
        pytest.raises(ValueError, match="of the 2 models cannot be mer"),
    ):
        batch(torch.tensor([[[1.0], [-1.0]], [[1.0], [2.0]]]), split=False)
    assert batch(torch.ones(2, 3, 1), split=False).shape == (6, 1)


def test_shared_inputs_are_right_model_by_model() -> None:
    models = separate(make, 4)
    for m in models:
        m.eval()
    batch, x = BatchModule.from_modules(models).eval(), torch.randn(6, 5)
    with pytest.warns(UserWarning, match="one by one"):
        close(batch(shared(x)), [m(x) for m in models], "output")


def test_separate_generators_of_dropout_are_used_by_each_model() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5) * (1 if x.sum().item() > 50 else 2)

    x = torch.ones(3, 4, 50)
    x[0] = 0.1
    batch = BatchModule(Own(forward, l=nn.Linear(1, 1)), 3)
    with pytest.warns(UserWarning, match="one by one"):
        rows = batch(x).flatten(0, 1)
    assert len(rows.unique(dim=0)) == 12
    compare_buffers(batch, [])
