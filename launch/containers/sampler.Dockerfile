# The sampler's environment on NVIDIA's TensorRT-LLM image. Never built by this project so far.
#
#   docker build -f launch/containers/sampler.Dockerfile -t srlm-sampler .          (in the project's root)
#   docker run --rm --gpus all srlm-sampler srlm doctor --for sampling
#   srlm run CONFIG sampler.container=srlm-sampler
#
# Under Slurm pyxis takes a bare name for an image on Docker Hub; make a file that all nodes see:
#
#   enroot import --output /images/srlm-sampler.sqsh dockerd://srlm-sampler
#   srlm launch slurm CONFIG sampler.container=/images/srlm-sampler.sqsh
#
# TensorRT-LLM, torch, transformers and modelopt are the image's own: its pins exclude the trainer's, which is why
# sampling has an environment of its own (docs/sampling.md). Nothing here replaces a package that is already there.
FROM nvcr.io/nvidia/tensorrt-llm/release:1.2.1

RUN pip install --no-cache-dir jinja2 numpy orjson psutil pydantic pyyaml rapidfuzz regex rich tenacity tokenizers typer xxhash \
        packaging

COPY pyproject.toml setup.py README.md LICENSE /opt/srlm-mega/
COPY srlm_mega /opt/srlm-mega/srlm_mega
COPY kernels /opt/srlm-mega/kernels
COPY launch /opt/srlm-mega/launch
COPY tools /opt/srlm-mega/tools
COPY checkpoints_conversion /opt/srlm-mega/checkpoints_conversion
RUN pip install --no-cache-dir --no-deps /opt/srlm-mega

ENV PYTHONSAFEPATH=1
