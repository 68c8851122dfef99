# The environment of sampler.backend=vllm on vLLM's own image. Never built by this project so far.
#
#   docker build -f launch/containers/vllm.Dockerfile -t srlm-vllm .          (in the project's root)
#   docker run --rm --gpus all srlm-vllm srlm doctor --for sampling --backend vllm
#   srlm run CONFIG sampler.container=srlm-vllm
#
# Under Slurm pyxis takes a bare name for an image on Docker Hub; make a file that all nodes see:
#
#   enroot import --output /images/srlm-vllm.sqsh dockerd://srlm-vllm
#   srlm launch slurm CONFIG sampler.container=/images/srlm-vllm.sqsh
#
# vLLM, torch and transformers are the image's own: nothing here replaces a package that is already there. For
# sampler.quantization=fp8 add nvidia-modelopt of the version in launch/versions.toml, and requests.
FROM vllm/vllm-openai:v0.32.0

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
ENTRYPOINT []
