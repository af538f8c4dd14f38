"""Checkpoints of PagedAdamW: saved parts, failed loads, states of other optimizers, and forked processes."""

from __future__ import annotations

import copy
import io
import os

import pytest
import torch

from qlora_kernels.optim import PagedAdamW
from tests.optim.pair import Pair


class TestCheckpoints:
    def test_failed_load_changes_nothing(self, where):
        pair = Pair((5,), (5,), (4096,), **where)
        pair.steps()
        optimizer = pair.both[0]
        before = copy.deepcopy(optimizer.state_dict())

        def broken(change):
            saved = copy.deepcopy(before)
            for state in saved["state"].values():
                state["exp_avg"] += 1
            saved["param_groups"][0]["lr"] = 5.0
            change(saved)
            return saved

        for change in (
            lambda s: s["state"][2].update(exp_avg=torch.zeros(7)),
            lambda s: s["state"][2].pop("exp_avg_sq"),
            lambda s: s["state"][1].update(step=torch.zeros(3)),
            lambda s: s["state"][1].pop("step"),
            lambda s: s["param_groups"][0].update(amsgrad=True),
            lambda s: s["param_groups"][0].update(lr=-1.0),
            lambda s: s["param_groups"][0].update(params=[0, 1]),
        ):
            with pytest.raises(ValueError, match=r"PagedAdamW|parameter group"):
                optimizer.load_state_dict(broken(change))
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for key, state in before["state"].items():
            assert all(torch.equal(after["state"][key][name], value) for name, value in state.items())

    @pytest.mark.parametrize("bits", [32, 8])
    def test_torch_save_of_everything(self, bits, where):
        pair = Pair((70, 70), (3,), state_bits=bits, **where)
        pair.steps()
        optimizer = pair.both[0]
        for value in (optimizer, optimizer.state_dict(), optimizer.packed_state_dict(), optimizer.state):
            buffer = io.BytesIO()
            torch.save(value, buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=False)
            copy.deepcopy(value)

    @pytest.mark.parametrize("state_dict", ["state_dict", "packed_state_dict"])
    def test_saved_part_of_state_dict_has_only_its_bytes(self, state_dict, where):
        pair = Pair((500, 500), (3,), state_bits=8, **where)
        pair.steps(1)
        buffer = io.BytesIO()
        torch.save({1: getattr(pair.both[0], state_dict)()["state"][1]}, buffer)
        assert buffer.tell() < 4096

    def test_hooks_receive_torch_state_dict(self):
        pair = Pair((70, 70), state_bits=8)
        pair.steps(1)
        optimizer, seen = pair.both[0], []
        optimizer.register_state_dict_pre_hook(lambda o: seen.append("before"))
        optimizer.register_state_dict_post_hook(lambda o, s: seen.append(set(s["state"][0])))
        optimizer.register_state_dict_post_hook(lambda o, s: {**s, "note": 1})
        assert optimizer.state_dict()["note"] == 1
        assert seen[0] == "before"
        assert {"step", "exp_avg", "exp_avg_sq"} <= seen[1]

    def test_states_of_other_optimizers_load(self):
        pair = Pair((5,), (4,))
        pair.steps()
        saved = copy.deepcopy(pair.both[1].state_dict())
        for state in saved["state"].values():
            state["step"] = int(state["step"])  # the form of older versions of torch
        saved["state"]["note"] = {"of": "a user"}
        saved["param_groups"][0] = {name: saved["param_groups"][0][name] for name in ("params", "lr", "betas")}
        optimizer = PagedAdamW(pair.params[0])
        optimizer.load_state_dict(saved)
        assert optimizer.state["note"] == {"of": "a user"}
        assert optimizer.param_groups[0]["eps"] == 1e-8
        pair.both[0] = optimizer
        pair.steps()
        pair.check_params()

    def test_nan_states_do_not_spread_when_they_are_loaded_into_8_bits(self):
        pair = Pair((70, 70))
        pair.steps(1)
        saved = copy.deepcopy(pair.both[1].state_dict())
        saved["state"][0]["exp_avg"][0, 0] = torch.nan
        optimizer = PagedAdamW(pair.params[0], state_bits=8)
        optimizer.load_state_dict(saved)
        assert optimizer.state_dict()["state"][0]["exp_avg"].isfinite().all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
class TestFork:
    @staticmethod
    def in_child(function):
        """Return the exit code of a forked child that runs `function`; 0 if it returns True."""
        pid = os.fork()
        if pid == 0:
            code = 2
            try:
                code = 0 if function() else 1
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def test_a_child_cannot_step_or_write_states_on_a_disk(self, tmp_path):
        pair = Pair((5000,), page_dir=tmp_path)
        pair.steps()
        optimizer, param = pair.both[0], pair.params[0][0]
        before = {name: value.clone() for name, value in optimizer.state[param].items()}

        def refused():
            try:
                optimizer.step()
            except RuntimeError as error:
                return "belong to process" in str(error)

        def write():
            optimizer.state[param]["exp_avg"].fill_(7.0)
            return bool((optimizer.state[param]["exp_avg"] == 7).all())

        assert self.in_child(refused) == 0
        assert self.in_child(write) == 0
        assert all(torch.equal(value, before[name]) for name, value in optimizer.state[param].items())
        pair.steps()
        pair.check()

    def test_a_child_steps_its_own_copy_of_states_in_memory(self):
        pair = Pair((5000,))
        pair.steps()
        before = pair.both[0].state[pair.params[0][0]]["exp_avg"].clone()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            assert self.in_child(lambda: pair.both[0].step() is None) == 0
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(pair.both[0].state[pair.params[0][0]]["exp_avg"], before)
