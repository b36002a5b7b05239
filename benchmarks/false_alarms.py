"""Whether checks find what is not there: architectures of timm, torchvision and transformers with random weights.

Each is trained on in batches of several sizes, with a check in every call: in float32, bfloat16, under autocast, in
channels_last, and, for a few, compiled. It prints the largest error of a row, relative to its norm, and every alarm.
"""

from __future__ import annotations

import argparse
import functools
import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchcache import set_logger_config, torchcache

ROWS, BATCHES = 12, (8, 1, 5)
TIMM = (
    "resnet18 resnetv2_50 efficientnet_b0 mobilenetv3_small_100 mobilenetv2_050 convnext_atto convnextv2_atto "
    "vit_tiny_patch16_224 deit_tiny_patch16_224 swin_tiny_patch4_window7_224 mixer_s32_224 ghostnet_050 "
    "xcit_nano_12_p16_224 levit_128s pvt_v2_b0 poolformer_s12 edgenext_xx_small mobilevit_xxs regnetx_002 regnety_002 "
    "densenet121 dla34 res2net50_26w_4s hrnet_w18_small cspresnet50 maxvit_rmlp_pico_rw_256 coatnet_nano_rw_224 "
    "beit_base_patch16_224 gcvit_xxtiny repvgg_a0 tinynet_e lcnet_035 fastvit_t8 tf_efficientnetv2_b0 resmlp_12_224 "
    "cait_xxs24_224 crossvit_tiny_240 nfnet_l0 visformer_tiny "
)
TORCHVISION = "resnet18 shufflenet_v2_x0_5 squeezenet1_1 mnasnet0_5 googlenet vgg11_bn swin_v2_t"
TRANSFORMERS = {
    "BertConfig": {}, "RobertaConfig": {},
    "DistilBertConfig": {"dim": 64, "hidden_dim": 128, "n_heads": 4, "n_layers": 2},
    "AlbertConfig": {"embedding_size": 32}, "ElectraConfig": {},
    "GPT2Config": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "LlamaConfig": {"num_key_value_heads": 2}, "Qwen2Config": {"num_key_value_heads": 2}, "MPNetConfig": {},
    "T5EncoderConfig": {},
}  # fmt: skip


def define_operators() -> torch.library.Library:
    """Declares operators without which torchvision cannot be imported: the package index has a build for CUDA only."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in () if torch.version.cuda else ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


class Features(nn.Module):
    """One tensor of features for each row."""

    def __init__(self, network: nn.Module, **arguments: Any) -> None:
        super().__init__()
        self.network = network
        self.arguments = arguments
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        y = self.network(x, **self.arguments)
        return y if isinstance(y, Tensor) else y[0]


Make = Callable[[], tuple[nn.Module, Tensor]]


def timm_model(name: str) -> tuple[nn.Module, Tensor]:
    import timm

    network: Any = timm.create_model(name, pretrained=False, num_classes=0)
    channels, *size = network.pretrained_cfg["input_size"]
    if not network.pretrained_cfg.get("fixed_input_size") and "max" not in name:
        size = [96, 96]  # enough to reach every kernel
    return Features(network), torch.randn(ROWS, channels, *size)


def torchvision_model(name: str) -> tuple[nn.Module, Tensor]:
    import torchvision

    extra = {"init_weights": False} if name == "googlenet" else {}
    return Features(torchvision.models.get_model(name, weights=None, **extra)), torch.randn(ROWS, 3, 96, 96)


def transformers_model(name: str) -> tuple[nn.Module, Tensor]:
    import transformers

    if name == "T5EncoderConfig":
        config = transformers.T5Config(vocab_size=1000, d_model=64, d_ff=128, num_layers=2, num_heads=4)
        return Features(transformers.T5EncoderModel(config)), torch.randint(5, 999, (ROWS, 32))
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    given = TRANSFORMERS[name]
    config = getattr(transformers, name)(
        vocab_size=1000, **({} if name.startswith(("Distil", "GPT2")) else small), **given
    )
    arguments = {"use_cache": False} if name in ("GPT2Config", "LlamaConfig", "Qwen2Config") else {}
    return Features(transformers.AutoModel.from_config(config), **arguments), torch.randint(5, 999, (ROWS, 32))


def all_models() -> Iterator[tuple[str, Make]]:
    for library, make, names in [
        ("timm", timm_model, TIMM.split()),
        ("torchvision", torchvision_model, TORCHVISION.split()),
        ("transformers", transformers_model, list(TRANSFORMERS)),
    ]:
        for name in names:
            yield f"{library} {name}", functools.partial(make, name)


class Alarms(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "not cached" in record.getMessage():
            self.messages.append(record.getMessage())


def check(network: nn.Module, data: Tensor, precision: str) -> tuple[int, float]:
    """How many rows were compared, and the largest error."""
    network, data = network.float(), data
    if precision == "bfloat16":
        network = network.bfloat16()
        data = data.bfloat16() if data.is_floating_point() else data
    if precision == "channels_last":
        network, data = network.to(memory_format=torch.channels_last), data.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if precision == "compiled":
        network = Features(torch.compile(network))  # type: ignore[arg-type]
    module: Any = torchcache(verify=1)(Features(network))
    cache = module.cache_instance
    cache._counts.hits["memory"] += 1000  # so that the first call is checked
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        for batch in BATCHES if precision != "compiled" else BATCHES[:1]:
            for rows in torch.randperm(len(data)).split(batch)[:2]:
                module(data[rows])
    info = cache.info()
    return info.checks, info.largest_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression for names")
    parser.add_argument("--precisions", default="float32,bfloat16,autocast,channels_last")
    parser.add_argument("--compiled", type=int, default=3, help="how many architectures are also compiled")
    given = parser.parse_args()
    operators = define_operators()  # kept until the end
    set_logger_config(level="ERROR")
    alarms = Alarms()
    logging.getLogger("torchcache").addHandler(alarms)
    logging.getLogger("torchcache").setLevel(logging.WARNING)
    largest: dict[str, float] = {}
    models = [(name, make) for name, make in all_models() if re.search(given.only, name)]
    for number, (name, make) in enumerate(models):
        torch.manual_seed(0)
        network, data = make()
        precisions = given.precisions.split(",") + (["compiled"] if number < given.compiled else [])
        if data.dim() != 4:
            precisions = [p for p in precisions if p != "channels_last"]
        said = []
        for precision in precisions:
            before, start = len(alarms.messages), time.perf_counter()
            checks, error = check(network, data, precision)
            largest[precision] = max(largest.get(precision, 0.0), error)
            alarm = " ALARM" if len(alarms.messages) > before else ""
            said.append(f"{precision} {error:.1e} ({checks} rows, {time.perf_counter() - start:.0f} s){alarm}")
        print(f"{name:38} {'  '.join(said)}", flush=True)
    print(f"\n{len(models)} architectures, largest errors: " + ", ".join(f"{p} {e:.1e}" for p, e in largest.items()))
    print(f"alarms: {len(alarms.messages)}")
    print("\n".join(alarms.messages))
    del operators


if __name__ == "__main__":
    main()
