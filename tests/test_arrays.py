"""Arrays of any framework, taken without importing it."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import wavg
from trees import assert_same_tree
from wavg.arrays import to_numpy
from wavg.dtypes import lookup
from wavg.errors import WavgError

os.environ["KERAS_BACKEND"] = "jax"
DTYPES = ["float32", "float64", "float16", "bfloat16", "int64", "bool", "complex64"]
FLOAT8 = ["float8_e4m3fn", "float8_e5m2"]


def values(dtype):
    return np.array([[1.5, 0, -2], [3, 4, 0.1]]).astype(lookup(dtype).numpy)


class Shared:
    """Has nothing but the protocol of DLPack."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class Converted:
    """Has nothing but the protocol of NumPy."""

    def __array__(self, dtype=None, copy=None):
        return values("float32")


@pytest.mark.parametrize("leaf", [Shared(values("float32")), Converted(), values("float32")])
def test_the_array_protocols_are_enough(leaf):
    assert_same_tree(to_numpy(leaf), values("float32"))


def test_numbers_and_foreign_orders_of_bytes_are_arrays():
    assert_same_tree(to_numpy(2), np.array(2))
    assert_same_tree(to_numpy(np.float32(2)), np.array(2, "f4"))
    assert to_numpy(np.array([1, 2], ">f4")).dtype.isnative


def test_a_numpy_array_is_not_copied():
    array = values("float32")
    assert to_numpy(array) is array


def test_a_leaf_that_cannot_be_an_array_is_named():
    class Broken:
        def __array__(self, dtype=None, copy=None):
            raise TypeError("cannot be converted")

    with pytest.raises(WavgError, match=r"leaf layers\[1\]: cannot be converted"):
        wavg.StreamingAverager().update({"layers": [1.0, Broken()]})


def test_no_framework_is_imported():
    code = (
        "import sys, wavg; a = wavg.StreamingAverager(); a.update({'w': 1.0}); a.result();"
        "print(sorted({'torch', 'jax', 'tensorflow', 'keras'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    assert done.stdout.strip() == b"[]"


def test_a_jax_array_that_was_donated_is_named():
    jax = pytest.importorskip("jax")
    leaf = jax.numpy.ones(2)
    leaf.delete()
    with pytest.raises(WavgError, match=r"leaf w: .*has been deleted"):
        wavg.StreamingAverager().update({"w": leaf})


@pytest.mark.parametrize("dtype", [*DTYPES, *FLOAT8])
def test_jax_arrays(dtype):
    jax = pytest.importorskip("jax")
    if dtype in ("float64", "int64"):
        pytest.skip("JAX has these only if told to")
    leaf = jax.numpy.asarray(values(dtype))
    assert_same_tree(to_numpy(leaf), values(dtype))
    models = [{"w": jax.numpy.asarray(values(dtype))}] * 3
    averager = wavg.StreamingAverager("linear")
    for model in models:
        averager.update(model)
    assert_same_tree(averager.result(), {"w": values(dtype)})
    assert_same_tree(wavg.average(models), {"w": values(dtype)})


def torch_of(torch, dtype):
    if dtype in ("bfloat16", *FLOAT8):
        return torch.tensor(values("float32").tolist()).to(getattr(torch, dtype))
    return torch.from_numpy(values(dtype))


@pytest.mark.frameworks
@pytest.mark.parametrize("dtype", [*DTYPES, *FLOAT8])
def test_torch_tensors_of_every_layout(dtype):
    torch = pytest.importorskip("torch")
    tensor = torch_of(torch, dtype)
    assert_same_tree(to_numpy(tensor), values(dtype))
    assert_same_tree(to_numpy(tensor.T), np.ascontiguousarray(values(dtype).T))
    assert_same_tree(to_numpy(tensor[:, 1]), np.ascontiguousarray(values(dtype)[:, 1]))
    assert_same_tree(to_numpy(tensor[0, 0]), values(dtype)[0, 0:1].reshape(()))
    if tensor.is_complex():
        assert_same_tree(to_numpy(tensor.conj()), values(dtype).conj())


@pytest.mark.frameworks
def test_torch_parameters_and_state_dicts_are_models():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).bfloat16()
    averager = wavg.StreamingAverager("linear")
    held = []
    for _ in range(3):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        held.append({name: to_numpy(t).copy() for name, t in network.state_dict().items()})
        averager.update(network.state_dict())
    assert_same_tree(dict(averager.result()), wavg.average(held, "linear"))
    live = wavg.StreamingAverager()
    live.update(dict(network.named_parameters()))  # these require gradients
    assert live.result()["0.weight"].dtype.name == "bfloat16"
    # The way back, bfloat16 included.
    state = {
        name: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if array.dtype.name == "bfloat16"
        else torch.from_numpy(array)
        for name, array in averager.result().items()
    }
    network.load_state_dict(state)
    assert_same_tree(to_numpy(network[0].weight), averager.result()["0.weight"])


@pytest.mark.frameworks
def test_torch_tensors_without_numbers_are_refused():
    torch = pytest.importorskip("torch")
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(WavgError, match="leaf w: a sparse float32 tensor of PyTorch"):
        wavg.StreamingAverager().update({"w": sparse})
    with pytest.raises(WavgError, match="leaf w: a meta float32 tensor"):
        wavg.average([{"w": torch.empty(3, device="meta")}])


@pytest.mark.frameworks
def test_a_distributed_tensor_of_torch_is_refused_with_what_to_do():
    torch = pytest.importorskip("torch")
    from torch import distributed
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        leaf = distribute_tensor(torch.ones(3), init_device_mesh("cpu", (1,)))
        with pytest.raises(WavgError, match=r"leaf w: a DTensor of PyTorch.*full_tensor\(\)"):
            wavg.StreamingAverager().update({"w": leaf})
        assert_same_tree(to_numpy(leaf.full_tensor()), np.ones(3, "f4"))
    finally:
        distributed.destroy_process_group()


@pytest.mark.frameworks
@pytest.mark.parametrize("dtype", [*DTYPES, *FLOAT8])
def test_tensorflow_tensors_and_variables(dtype):
    tf = pytest.importorskip("tensorflow")
    if dtype in FLOAT8:
        leaf = tf.cast(values("float32"), getattr(tf.dtypes.experimental, dtype))
    else:
        leaf = (
            tf.cast(values("float32"), dtype) if dtype == "bfloat16" else tf.constant(values(dtype))
        )
    assert_same_tree(to_numpy(leaf), values(dtype))
    if dtype not in FLOAT8:
        averager = wavg.StreamingAverager()
        averager.update([tf.Variable(leaf)])
        assert_same_tree(averager.result(), [values(dtype)])


def test_keras_variables():
    keras = pytest.importorskip("keras")
    averager = wavg.StreamingAverager()
    averager.update([keras.Variable(values("float32"))])
    assert_same_tree(averager.result(), [values("float32")])
