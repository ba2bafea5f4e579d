import math

import pytest
import torch
from torch import nn

from flowops.api.ferumal import FerumalFlow
from flowops.api.fit import FitConfig, fit_flow, log_prob, mean_and_error, mean_log_prob
from flowops.api.padded import PaddedFlow
from flowops.api.sets import load_toy


class Normal(nn.Module):
    """One Gaussian a column; ``broken_from`` makes its likelihood NaN from that call on."""

    def __init__(self, features, broken_from=None):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(features))
        self.calls, self.broken_from = 0, broken_from

    def log_prob(self, x):
        if self.training:
            self.calls += 1
        values = -0.5 * ((x - self.mean).square() + math.log(2 * math.pi)).sum(1)
        broken = self.broken_from is not None and self.calls >= self.broken_from
        return values * math.nan if broken else values


def toy(rows=600):
    values = torch.tensor(load_toy("moons", rows).values).float()
    return values[: rows - 100], values[rows - 100 :]


def test_the_maximum_of_the_likelihood_is_found():
    train, valid = torch.randn(300, 3) + torch.tensor([1.0, -2.0, 3.0]), torch.randn(50, 3)
    flow = Normal(3)
    fit_flow(flow, train, train, FitConfig(steps=600, batch_size=1000, lr=0.1))
    torch.testing.assert_close(flow.mean.detach(), train.mean(0), rtol=0, atol=1e-3)
    assert not flow.training
    expected = torch.distributions.Normal(flow.mean, 1).log_prob(valid).sum(1)
    torch.testing.assert_close(log_prob(flow, valid), expected.detach())


def test_the_result_depends_on_the_seed_alone():
    def run(seed):
        flow = PaddedFlow(FerumalFlow(3, layers=2, points=10), 2, 1)
        torch.manual_seed(int(torch.randint(1000, ())))  # what else draws must not matter
        result = fit_flow(flow, *toy(), FitConfig(steps=40, eval_every=20, seed=seed))
        return result, log_prob(flow, toy()[1], num_pads=4)

    (first, likelihoods), (again, same), (_, other) = run(1), run(1), run(2)
    assert torch.equal(likelihoods, same)
    assert not torch.equal(likelihoods, other)
    for a, b in zip(first.records, again.records, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_stops_when_validation_no_longer_improves_and_keeps_the_best():
    # Trained on rows around 3 while validation wants 1: it passes the best mean on its way.
    train, valid = torch.full((64, 1), 3.0), torch.full((8, 1), 1.0)
    flow, seen = Normal(1), []
    config = FitConfig(steps=4000, eval_every=5, patience=4, lr=0.05)
    result = fit_flow(flow, train, valid, config, seen.append)
    assert result.stopped == "patience"
    assert len(seen) == len(result.records) < 100
    best = max(seen, key=lambda record: record["valid"])
    assert (result.best_step, result.best_valid) == (best["step"], best["valid"])
    assert seen[-1]["step"] == best["step"] + 4 * 5
    assert mean_log_prob(flow, valid)[0] == pytest.approx(best["valid"])
    assert abs(flow.mean.item() - 1) < 0.15


def test_a_likelihood_that_is_not_finite():
    train, valid = torch.randn(64, 2), torch.randn(8, 2)
    config = FitConfig(steps=100, eval_every=10)
    with pytest.raises(FloatingPointError, match=r"after 10 steps .*learning rate 0.005"):
        fit_flow(Normal(2, broken_from=5), train, valid, config)
    flow = Normal(2, broken_from=25)
    result = fit_flow(flow, train, valid, config)
    assert (result.stopped, len(result.records)) == ("diverged", 2)
    assert flow.mean.isfinite().all()


def test_an_interrupt_keeps_what_there_is():
    def interrupt_at(step):
        def on_validation(record):
            if record["step"] == step:
                raise KeyboardInterrupt

        return on_validation

    train, flow = torch.randn(64, 2) + 5, Normal(2)
    result = fit_flow(flow, train, train, FitConfig(steps=100, eval_every=10), interrupt_at(20))
    assert (result.stopped, result.best_step, len(result.records)) == ("interrupted", 20, 2)
    assert mean_log_prob(flow, train)[0] == result.best_valid
    flow.log_prob = lambda x: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        fit_flow(flow, train, train, FitConfig())


def test_every_row_is_seen_once_an_epoch():
    class Recorder(Normal):
        def log_prob(self, x):
            if self.training:
                seen.append(x[:, 0].detach().clone())
            return super().log_prob(x)

    seen: list[torch.Tensor] = []
    train = torch.arange(40.0)[:, None]
    fit_flow(Recorder(1), train, train, FitConfig(steps=8, eval_every=8, batch_size=10))
    for epoch in (seen[:4], seen[4:]):
        assert torch.equal(torch.cat(epoch).sort().values, torch.arange(40.0))
    assert not torch.equal(torch.cat(seen[:4]), torch.cat(seen[4:]))


def test_mean_and_standard_error():
    mean, error = mean_and_error(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert mean == 2.5
    assert error == pytest.approx(math.sqrt(5 / 3) / 2)
    assert math.isnan(mean_and_error(torch.tensor([1.0]))[1])


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 0), ("batch_size", 2.5), ("patience", True), ("lr", 0.0)]
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected a positive"):
        FitConfig(**{name: value})
