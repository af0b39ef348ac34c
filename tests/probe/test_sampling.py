"""Which steps are probed, what is active on the others, and how a run goes on after a restart."""

from __future__ import annotations

import io

import pytest
import torch

import attnprobe as ap
from tests.global_state import global_state
from tests.probe.models import batch, loss_of, net, run

#: every_n_steps -> the first probed steps
PHASES = {
    1: [0, 1, 2, 3, 4, 5, 6],
    4: [0, 4, 8, 12, 16, 20, 24],
    10: [0, 10, 20, 30, 40, 50, 60],
    50: [0, 10, 20, 30, 40, 90, 140],
}


@pytest.mark.parametrize("interval", PHASES)
def test_five_early_probes_then_one_every_interval(interval):
    expected = PHASES[interval]
    with ap.AttentionProbe(net(), every_n_steps=interval, alarms=(), writers=(memory := ap.MemoryWriter())) as probe:
        for step in range(expected[-1] + 1):
            assert probe.active == (step in expected)
            if probe.active:
                run(probe, probe.model)
            else:
                assert probe.step() is None
    assert [report.step for report in memory.reports] == expected


def test_nothing_is_active_on_an_unprobed_step():
    model, seen, before = net(), [], global_state()
    handle = model.layers[0].register_forward_hook(lambda *_: seen.append(global_state()))
    with ap.AttentionProbe(model, every_n_steps=3) as probe:
        for step in range(7):
            loss = loss_of(model, batch())
            loss.register_hook(lambda _: seen.append(global_state() | {"grad": True}))  # torch's own in backward: False
            loss.backward()
            probe.step(loss)
            inside, backward = seen[-2:]
            assert (inside == before) == (step % 3 > 0)
            assert (backward == before) == (step % 3 > 0)
            assert len(inside["modes"][0]) == len(before["modes"][0]) + (step % 3 == 0)
            assert backward["modes"] == before["modes"]
    handle.remove()


def test_the_loss_is_not_read_on_an_unprobed_step():
    class Untouchable:
        def __float__(self):
            raise AssertionError("read")

    model = net()
    with ap.AttentionProbe(model, every_n_steps=2) as probe:
        run(probe, model)
        assert probe.step(Untouchable()) is None


def test_the_model_is_left_as_it_was():
    model = net()
    before = {name: {**vars(module)} for name, module in model.named_modules()}
    with ap.AttentionProbe(model, every_n_steps=1) as probe:
        run(probe, model, 3)
        assert {name: {**vars(module)} for name, module in model.named_modules()} == before
    assert type(model.layers[0]).forward is net().layers[0].forward.__func__


@pytest.mark.parametrize("where", ["before", "forward", "backward", "after"])
def test_leaving_in_the_middle_of_a_step(where):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    model, memory, before = net(), ap.MemoryWriter(), global_state()

    def step():
        if where == "before":
            stop()
        if where == "forward":
            model.layers[1].register_forward_hook(stop)
        loss = loss_of(model, batch())
        if where == "backward":
            loss.register_hook(stop)
        loss.backward()
        stop()

    with pytest.raises(Stop), ap.AttentionProbe(model, writers=memory) as probe:
        step()
    assert global_state() == before
    assert memory.reports == []
    assert not probe.active
    assert probe.step() is None  # closed: nothing starts again
    assert global_state() == before


def test_an_interrupt_inside_the_forward_pass_leaves_no_mode_behind():
    model = net()

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.layers[1].out.register_forward_pre_hook(interrupt)
    before = global_state()
    with ap.AttentionProbe(model, every_n_steps=1) as probe:
        with pytest.raises(KeyboardInterrupt):
            model(batch())
        probe.discard()
        assert global_state() == before
        handle.remove()
        probe.begin(7)
        assert run(probe, model)[0].step == 7


def test_close_may_come_twice_and_without_with():
    probe = ap.AttentionProbe(net())
    probe.close()
    probe.close()
    assert not probe.active


def round_trip(state):
    """Through a checkpoint that holds nothing but plain types."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("cut", [1, 9, 37, 41, 60])
def test_a_restart_goes_on_exactly_where_the_run_was(cut):
    def steps(probe, model, begin, end):
        return [report.step for _ in range(begin, end) if (report := run(probe, model, x=x)[0])]

    model, x = net(), batch(2, 3)
    with ap.AttentionProbe(model, every_n_steps=20) as probe:
        whole = steps(probe, model, 0, 100)
    with ap.AttentionProbe(model, every_n_steps=20) as probe:
        first = steps(probe, model, 0, cut)
        state = round_trip(probe.state_dict())
    with ap.AttentionProbe(model, every_n_steps=20) as probe:
        probe.load_state_dict(state)
        assert probe.state_dict() == state
        assert first + steps(probe, model, cut, 100) == whole == [0, 10, 20, 30, 40, 60, 80]


def test_a_restart_knows_the_layers_and_the_alarms():
    model = net()
    with ap.AttentionProbe(model, every_n_steps=1, action="record") as probe:
        model.layers[0].forward = lambda x: x * 0  # this layer comes later only
        run(probe, model)
        del model.layers[0].forward
        loss_of(model, batch()).backward()
        (alarm,) = probe.step(float("inf")).alarms
        assert alarm.new
        state = round_trip(probe.state_dict())
    with ap.AttentionProbe(model, every_n_steps=1) as probe:
        probe.load_state_dict(state)
        loss_of(model, batch()).backward()
        report = probe.step(float("inf"))  # no warning: the alarm is not new
    assert report.layers == ("layers.1", "layers.0")
    assert [(alarm.new, alarm.since) for alarm in report.alarms] == [(False, 1)]
