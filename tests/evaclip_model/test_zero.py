"""A map from parameters to fp32 masters that is wrong is found before the first step."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from evaclip_model.training.engine.fp32_state import Partitioned, make_layout
from evaclip_model.training.optimizer.optimizer import Fragment


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def flattened(values):
    """Parameters as DeepSpeed leaves them: views of one flat tensor, each with its address."""
    flat = torch.cat([value.reshape(-1) for value in values])
    parameters, start = [], 0
    for value in values:
        parameter = nn.Parameter(flat.narrow(0, start, value.numel()).view(value.shape))
        here = SimpleNamespace(start=0, numel=value.numel())
        there = SimpleNamespace(start=start, numel=value.numel())
        parameter._hp_mapping = SimpleNamespace(lp_fragment_address=here, hp_fragment_address=there)
        parameters.append(parameter)
        start += value.numel()
    return parameters, flat


def placed(parameters, flat, ranks, masters=None):
    masters = flat.float().clone() if masters is None else masters
    return make_layout(parameters, flat, masters, ranks)


def test_a_right_map_gives_the_fragments(alone):
    parameters, flat = flattened([torch.randn(2, 3), torch.randn(4)])
    layout = placed(parameters, flat, alone)
    assert layout.fragments == (Fragment(0, 0, 0, 6), Fragment(1, 0, 6, 4))
    assert layout.ranks is None


def test_equal_values_do_not_hide_that_two_addresses_are_exchanged(alone):
    parameters, flat = flattened([torch.ones(4), torch.ones(4)])
    first, second = (parameter._hp_mapping for parameter in parameters)
    parameters[0]._hp_mapping, parameters[1]._hp_mapping = second, first
    with pytest.raises(RuntimeError, match="map from parameters"):
        placed(parameters, flat, alone)


def test_equal_values_do_not_hide_that_the_parameters_are_in_another_order(alone):
    parameters, flat = flattened([torch.ones(4), torch.ones(4)])
    first, second = (parameter.data for parameter in parameters)
    parameters[0].data, parameters[1].data = second, first
    with pytest.raises(RuntimeError, match="follow one another"):
        placed(parameters, flat, alone)


def test_a_parameter_without_an_address_is_found(alone):
    parameters, flat = flattened([torch.ones(4), torch.ones(4)])
    parameters[1]._hp_mapping = None
    with pytest.raises(RuntimeError, match="follow one another"):
        placed(parameters, flat, alone)


def test_masters_of_other_values_are_found(alone):
    parameters, flat = flattened([torch.ones(4), torch.ones(4)])
    masters = flat.clone()
    masters[5] = 2
    with pytest.raises(RuntimeError, match="masters differ"):
        placed(parameters, flat, alone, masters)


@pytest.mark.parametrize(("reorders", "padding"), [(True, 0), (False, 2)])
def test_a_deepspeed_that_reorders_or_pads_is_refused(reorders, padding):
    zero = SimpleNamespace(round_robin_gradients=reorders, round_robin_bit16_padding=[[0, padding]])
    with pytest.raises(RuntimeError, match="reorders or pads"):
        Partitioned(zero, {})
