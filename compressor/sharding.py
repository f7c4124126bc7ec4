"""A backbone whose decoder layers are spread over the processes of `accelerate launch`.

FSDP2 cuts the weights of every layer into as many parts as there are processes; the processes
put a layer together when it runs (an all-gather) and drop the others' parts after it. A layer
therefore runs in all processes or in none, and in the same order: one that ran a layer more
would wait for ever. While routers are tuned that holds by itself: every process has a batch of
its own and runs the same layers. What is measured before and after is full of choices (what to
remove next, which tau to try, when an answer ends), and two processes that round differently
could choose differently. So the first process alone measures, and writes files; the others hand
over their parts of the layers that it calls.

Source: torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from mskip.compressor.compensation import Compensation
from mskip.compressor.encoding import Sample
from mskip.compressor.errors import MskipError, RecipeError
from mskip.compressor.families import family_of
from mskip.compressor.models import BaseModel, device_of
from mskip.compressor.progress import Progress, silent
from mskip.compressor.recipe import ModelSpec, TuningSpec
from mskip.compressor.router import Routers
from mskip.compressor.sublayers import Sublayers
from mskip.compressor.tuning import Tuned, tune

# What the first process says when it does not name a layer.
_DONE, _FAILED, _TUNE = -1, -2, -3

# Between two words of the first process data may be downloaded, or a map be fitted.
_PATIENCE = timedelta(days=7)

_LAUNCH = "accelerate launch --num_processes 4 -m mskip.cli.main tune"


def process_count() -> int:
    """How many processes the launcher started, by its environment; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_shardable(spec: ModelSpec) -> None:
    """Refuse ``model.shard`` where there is nothing to spread the layers over.

    Raises:
        RecipeError: one process only, one device for all, another kind of spreading besides, or
            accelerate was told to shard too.
    """
    if not spec.shard:
        return
    if spec.device_map is not None:
        raise RecipeError(
            f"model.shard and model.device_map = {spec.device_map!r} both spread the layers.",
            "Set model.device_map to null, or model.shard to false.",
        )
    if process_count() < 2:
        raise RecipeError(
            "model.shard spreads the layers over several processes, and there is only one.",
            f"Start it with: {_LAUNCH}, or set model.shard to false.",
        )
    if spec.device not in ("auto", "cpu"):
        raise RecipeError(
            f"model.shard gives every process a GPU of its own; model.device = {spec.device!r} "
            "would put all of them on one.",
            "Set model.device to auto.",
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes"):
        raise RecipeError(
            "model.shard does by itself what accelerate's FSDP is asked for besides.",
            f"Leave out --use_fsdp and the fsdp part of accelerate's configuration: {_LAUNCH}",
        )


def shard_layers(model: PreTrainedModel, device: torch.device | None = None) -> None:
    """Spread every decoder layer over all processes, each as an FSDP2 unit of its own, for good.

    Embedding, final norm and head stay whole in every process: `SplitModel` and `Family` call
    them, and the decoder layers one by one, outside of the model's own forward, where a unit
    around the whole model would not put them together. Between its calls a layer's parameters
    are the local parts (DTensors, cut along dimension 0); in a call they are whole. While a
    layer runs, the next one is fetched: in the backward pass the one before it.

    From here on all processes must call the same layers in the same order. `StemStore` does not
    see to that: tune with ``cache_gib`` 0, as `Processes.tune` does.

    Args:
        model: a frozen causal LM; all processes are in the default process group (nccl for
            cuda, gloo for cpu). Sharded already, it stays as it is.
        device: of this process, to which the parts of the layers go, one layer at a time, and
            then the rest of the model; None for the model's own.

    Raises:
        ModelError: unsupported architecture.
    """
    layers = family_of(model).decoder_layers(model)
    if isinstance(layers[0], FSDPModule):
        return
    device = model.device if device is None else device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Left open, whether a unit that runs by itself goes apart again would be up to FSDP.
    units = [fully_shard(layer, mesh=mesh, reshard_after_forward=True) for layer in layers]
    above = _Above(layers)
    fully_shard(above, mesh=mesh)  # in place
    above()
    for number, unit in enumerate(units):
        # In so many words: what FSDP does by itself goes by what has run in this process.
        unit.set_modules_to_forward_prefetch(units[number + 1 : number + 2])
        unit.set_modules_to_backward_prefetch([units[max(number - 1, 0)]])
    spread = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        if id(module) not in spread:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.to(device)


class _Above(nn.Module):
    """Called once before any layer, it makes them share their streams.

    With streams of its own, every layer would leave its whole size behind in the allocator.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self) -> None:
        """Nothing runs."""


class Processes:
    """All processes of one launch: the first leads, the others `follow`, and all tune.

    Words go over a gloo group of their own, in plain numbers and JSON; nothing is pickled.

    Args:
        base: the base model, the same in every process. With ``sharded`` its layers are spread.
        sharded: spread the layers.
        device: see `shard_layers`.

    Raises:
        ModelError: unsupported architecture.
    """

    def __init__(
        self, base: BaseModel, *, sharded: bool, device: torch.device | None = None
    ) -> None:
        self.base, self.sharded = base, sharded
        self.first = dist.get_rank() == 0
        self._layers = family_of(base.model).decoder_layers(base.model)
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._heard = False  # the others take part of themselves, and wait for no word
        if sharded:
            shard_layers(base.model, device)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """For the first process: what runs in the block has the others' help, until its end."""
        hooks = [
            # Before FSDP's own, which waits for the others.
            layer.register_forward_pre_hook(partial(self._call, number), prepend=True)
            for number, layer in enumerate(self._layers if self.sharded else ())
        ]
        self._heard = True
        try:
            yield
        except BaseException:
            self._say(_FAILED)
            raise
        else:
            self._say(_DONE)
        finally:
            self._heard = False
            for hook in hooks:
                hook.remove()

    def _call(self, number: int, layer: nn.Module, args: Any) -> None:
        self._say(number)

    def tune(
        self,
        base: BaseModel,
        routers: Routers,
        samples: list[Sample],
        spec: TuningSpec,
        target: float,
        checkpoints: Path,
        *,
        progress: Progress = silent,
        **options: Any,
    ) -> Tuned:
        """`mskip.compressor.tuning.tune` in all processes, called in the first one while it leads.

        The others are told everything; what they tune is the same and is dropped. Where the
        layers are spread, no dense activations are kept between epochs: a process that has its
        samples' would pass over layers that the others wait for.

        Raises:
            Interrupted: Ctrl-C, in all processes; a checkpoint has been saved.
        """
        if self.sharded:
            spec = spec.model_copy(update={"cache_gib": 0.0})
        sublayers = routers.sublayers
        self._say(_TUNE)
        self._send(
            {
                "layers": sublayers.layers,
                "granularity": sublayers.granularity,
                "unit": sublayers.unit,
                "rank": sublayers.compensation_rank,
                "hidden": routers.hidden_size,
                "bias": routers.trains_bias,
                "samples": [[sample.input_ids, sample.prompt_length] for sample in samples],
                "spec": spec.model_dump_json(),
                "target": target,
                "checkpoints": str(checkpoints.absolute()),
                "options": options,
            }
        )
        self._share(routers)
        # What fails here fails in the others too, and they are not listening.
        self._heard = False
        tuned = tune(
            base, routers, samples, spec, target, checkpoints, progress=progress, **options
        )
        self._heard = True
        return tuned

    def follow(self) -> None:
        """For the other processes: do what the first one's block needs, until it ends.

        Raises:
            MskipError: the first process failed.
            Interrupted: see `tune`.
        """
        while (word := self._hear()) != _DONE:
            if word == _FAILED:
                raise MskipError("the first process failed; its own message says why.")
            if word == _TUNE:
                self._tune_along(self._receive())
            else:
                layer, *following = cast(list[FSDPModule], self._layers[word : word + 2])
                layer.unshard()
                for other in following:  # as `shard_layers` has it
                    other.unshard(async_op=True)
                layer.reshard()

    def _tune_along(self, job: dict[str, Any]) -> None:
        layers, hidden, rank = job["layers"], job["hidden"], job["rank"]
        compensation = Compensation(len(layers), hidden, rank) if rank else None
        sublayers = Sublayers(layers, job["granularity"], compensation, job["unit"])
        routers = Routers(sublayers, hidden, bias=job["bias"]).to(self.base.model.device)
        self._share(routers)
        tune(
            self.base,
            routers,
            [Sample(*sample) for sample in job["samples"]],
            TuningSpec.model_validate_json(job["spec"]),
            job["target"],
            Path(job["checkpoints"]),
            **job["options"],
        )

    # -- words --------------------------------------------------------------------------------

    def _say(self, word: int) -> None:
        if self._heard:
            self._broadcast(torch.tensor(word))

    def _hear(self) -> int:
        return int(self._broadcast(torch.tensor(0)))

    def _send(self, value: dict[str, Any]) -> None:
        text = torch.frombuffer(bytearray(json.dumps(value), "utf-8"), dtype=torch.uint8)
        self._broadcast(torch.tensor(len(text)))
        self._broadcast(text)

    def _receive(self) -> dict[str, Any]:
        text = self._broadcast(torch.empty(self._hear(), dtype=torch.uint8))
        value: dict[str, Any] = json.loads(bytes(text.tolist()))
        return value

    @torch.no_grad()
    def _share(self, routers: Routers) -> None:
        """Give all processes the first one's routers, and their compensation."""
        for module in (routers, routers.sublayers.compensation):
            for tensor in () if module is None else module.state_dict().values():
                tensor.copy_(self._broadcast(tensor.to("cpu", copy=True).contiguous()))

    def _broadcast(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, 0, group=self._group)
        return tensor


Tune = Callable[..., Tuned]
"""`mskip.compressor.tuning.tune`, or `Processes.tune`."""


def meet(spec: ModelSpec, base: BaseModel) -> Processes | None:
    """The processes of this launch, with the layers spread if the recipe says so.

    Args:
        spec: the recipe's model section.
        base: the base model.

    Returns:
        None where this process is the only one.

    Raises:
        RecipeError: see `require_shardable`.
        ModelError: unsupported architecture.
    """
    require_shardable(spec)
    if process_count() < 2:
        return None
    device = device_of(spec) if spec.shard else base.model.device
    if not dist.is_initialized():
        from accelerate import PartialState

        # As the Trainer would, later; it takes the process group that it finds.
        PartialState(cpu=device.type == "cpu")
    return Processes(base, sharded=spec.shard, device=device)
