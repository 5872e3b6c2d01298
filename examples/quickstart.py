"""Convert a video network, see what it costs, save it, load it.

python examples/quickstart.py                                # small and quick, random weights
python examples/quickstart.py --weights KINETICS400_V1       # downloads torchvision's weights
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torchvision.models.video import r2plus1d_18

import redconvert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", help="for example KINETICS400_V1")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=56)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = r2plus1d_18(weights=arguments.weights).eval()
    clips = torch.randn(2, 3, arguments.frames, arguments.size, arguments.size)

    # 1. A dry run: a verdict and a reason per convolution. The stem suffers most, so leave it dense.
    config = redconvert.ConvertConfig(rules={"stem.*": None})
    plan = redconvert.plan(model, config, example_inputs=clips)
    print(f"{len(plan.converted)} of {len(plan.verdicts)} convolutions would become dynamic\n")

    # 2. Convert: the same class, the same parameters, the same outputs to the bit.
    dynamic = redconvert.convert(model, config, example_inputs=clips)
    with torch.no_grad():
        assert torch.equal(dynamic(clips), model(clips))

    # 3. What would half of the channels cost in the first clip, and half of the frames in the second?
    with redconvert.forced(dynamic, channel=[1, 0], temporal=[0, 1]):
        print(redconvert.report(dynamic, clips, repeats=2))

    # 4. Save, and load into a fresh network of the same architecture.
    with tempfile.TemporaryDirectory() as folder:
        redconvert.save_pretrained(dynamic, folder)
        loaded = redconvert.from_pretrained(r2plus1d_18().eval(), folder)
    with torch.no_grad():
        assert torch.equal(loaded(clips), dynamic(clips))
    print("\nsaved, loaded, and equal to the bit")


if __name__ == "__main__":
    main()
