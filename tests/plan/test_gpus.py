"""Named hardware: arithmetic of published trainings, and what is said of requests that cannot be met."""

from dataclasses import replace

import pytest

from twelve.config import deepseek_v2_lite, deepseek_v3
from twelve.errors import InputError
from twelve.plan import cost, gpus
from twelve.planner import on_named, plan


def test_v3s_training_cost():
    assert 2_664_000 + 119_000 + 5_000 == 2_788_000
    result = plan(gpus="2048xH800", model="deepseek_v3", tokens=14.8e12, rent=2.0, currency="USD")
    # at the utilisation that the paper's 2.664M hours mean, the same hours come out
    share = 0.4 * result["device_hours"] / 2_664_000
    again = plan(gpus="2048xH800", model="deepseek_v3", tokens=14.8e12, utilisation=share, rent=2.0)
    assert again["device_hours"] == pytest.approx(2_664_000, rel=1e-9)
    assert again["rent"].startswith("5,328,000.00 at 2") and 0.3 < share < 0.5
    # 343 TFLOP/s a device by 6 N D, which is 35% of the peak
    reached = 6 * 37e9 * 14.8e12 / (2_664_000 * 3600)
    assert reached == pytest.approx(343e12, rel=0.003)


def test_optimiser_states_of_v3():
    total = cost.parameters(deepseek_v3()).total
    assert gpus.sharded(total, 1, state=12) == pytest.approx(8.05e12, rel=1e-3)  # float32 copy and averages
    assert gpus.sharded(total, 1, state=8) == pytest.approx(5.37e12, rel=1e-3)  # averages in bfloat16


@pytest.mark.parametrize("text", ["8xH100", "8 x h100", "8*NVIDIA H100", "8xH100"])
def test_names_as_people_write_them(text):
    cluster = gpus.read_cluster(text)
    assert (cluster.name, cluster.count) == ("H100", 8)
    assert gpus.read_cluster("rtx 4090").device is gpus.TABLE["RTX4090"]
    assert gpus.read_cluster("2xA100-80GB").name == "A100-80"


@pytest.mark.parametrize("text", ["", "8x", "0xH100", "9xH900", "x", "9" * 400 + "xH100"])
def test_unknown_hardware_is_one_line(text):
    with pytest.raises(InputError, match="8xH100; known: A100-40") as told:
        plan(gpus=text)
    assert "\n" not in str(told.value)


def test_what_does_not_fit_says_so():
    with pytest.raises(InputError, match="GB a device are needed.*H100 has 80 GB: take more"):
        plan(gpus="8xH100", model="deepseek_v3")
    with pytest.raises(InputError, match="add --gpus"):
        plan(parameters=7e9)
    with pytest.raises(InputError, match="leave one out"):
        plan(gpus="8xH100", model="deepseek_v3", parameters=7e9)


def test_the_size_goes_by_the_utilisation_that_is_asked_for():
    """20 tokens a parameter, in the time: N and D of C = 6 N D = 120 N^2."""
    for share in (0.1, 0.5):
        found = plan(gpus="8xH100", minutes=60, utilisation=share)
        assert found["parameters"] == pytest.approx((share * 8 * 989e12 * 3600 / 120) ** 0.5, rel=1e-6)
        assert found["tokens"] == pytest.approx(20 * found["parameters"], rel=1e-6) and "20 tokens" in found["why"]


def test_what_is_asked_for_in_vain_is_refused():
    for asked, words in (
        ({"gpus": "8xH100", "minutes": 60, "tokens": 1e9}, "--tokens and --minutes both say how long"),
        ({"gpus": "8xH100", "memory": 2**30}, "--memory is for a training here: leave it out with --gpus"),
        ({"gpus": "8xH100", "paths": ["a.txt"]}, "PATH is for a training here"),
        ({"gpus": "8xH100", "switches": {"hc_mult": 4}}, "--hc-mult is for a training here"),
        ({"model": "deepseek_v3", "minutes": 3.0}, "--minutes is for a training here: leave it out with --model"),
        ({"model": "deepseek_v3", "batch": 8}, "--batch is for a training here"),
        ({"model": "deepseek_v3", "price": 0.0}, "--price is for a training here"),
        ({"model": "deepseek_v3", "currency": "EUR"}, "--currency is for a training here"),
        ({"gpus": "8xH100", "parameters": 7e9, "context": 8192}, "--context says nothing of so many parameters"),
        ({"gpus": "1xH100", "parameters": 4.8e9}, "activations .assumed. 19.2"),
    ):
        with pytest.raises(InputError, match=words):
            plan(**asked)


def test_tiny_requests_are_no_division_by_zero():
    assert plan(gpus="8xH100", parameters=0.1)["parameters"] == 1
    found = plan(gpus="T4", minutes=1e-15)
    assert found["parameters"] == 1 and found["time"].endswith("of 65 TFLOPS in 16 bits")  # it has no bfloat16


def test_a_row_is_no_longer_than_the_model_reads():
    long, short = (plan(gpus="8xH100", model="deepseek_v2_lite", tokens=1e9, context=size)["flops_per_token"]
                   for size in (4096, 1024))  # fmt: skip
    config = replace(deepseek_v2_lite(), max_position_embeddings=1024)
    found = on_named("8xH100", config, None, 1e9, None, None, None, None, None, None, "")
    assert short < long and found["flops_per_token"] == short


def test_more_time_and_more_devices_make_larger_models():
    for middle in (("1xH100", 600), ("8xH100", 60)):
        asked = (("1xH100", 60), middle, ("8xH100", 600))
        sizes = [plan(gpus=devices, minutes=minutes)["parameters"] for devices, minutes in asked]
        assert sizes == sorted(sizes) and sizes[0] < sizes[1] < sizes[2]
    hour = plan(gpus="8xH100", minutes=60)
    assert hour["tokens"] == pytest.approx(20 * hour["parameters"], rel=1e-6) and hour["hours"] == pytest.approx(1)
    assert 6 * hour["parameters"] * hour["tokens"] == pytest.approx(0.4 * 8 * 989e12 * 3600, rel=1e-6)
    fits = plan(gpus="1xT4", minutes=1e6)
    assert fits["why"] == "the largest that fits" and sum(fits["memory"].values()) <= 16e9


def test_dense_peaks_are_no_sparse_ones():
    """FP8 is twice BF16 wherever there is FP8, and memory can be read a few times to some hundred times a second."""
    for name, device in gpus.TABLE.items():
        assert device.fp8 is None or device.fp8 == pytest.approx(2 * device.bf16, rel=0.03), name
        assert 10 < device.bandwidth / device.memory < 70, name
