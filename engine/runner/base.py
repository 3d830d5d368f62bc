"""The interface between the core and what computes its steps: a device with a model, or a fake in tests."""

from typing import Protocol

from engine.messages import EngineInfo
from engine.runner.batch_inputs import BatchInputs
from engine.step_plan import SampledTokens


class Runner(Protocol):
    """Computes steps over a paged KV cache that it owns."""

    info: EngineInfo  # max_model_len already bounded by the cache

    def execute(self, inputs: BatchInputs) -> SampledTokens:
        """Run one step and return the sampled tokens, `BAD_LOGITS` where logits were not finite.

        Keeps none of the inputs' arrays past the step: the next one is written into them. Mutates the KV cache only;
        running a step twice, or in parts in plan order, gives the same. Raises `DeviceMemoryError` if the step does not
        fit into memory, `DeviceLostError` if the device can run no more steps, and any error of model or sampler.
        """
        ...
