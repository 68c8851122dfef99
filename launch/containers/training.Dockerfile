# The trainer's environment on NVIDIA's PyTorch image. Never built by this project so far.
#
#   docker build -f launch/containers/training.Dockerfile -t srlm-training .        (in the project's root)
#   docker run --rm --gpus all srlm-training srlm doctor --for training
#
# torch, CUDA, NCCL, Transformer Engine, flash-attn, apex and triton are the image's own, built for one another. The image
# holds pip to the versions it has (/etc/pip/constraint.txt), so what is installed here cannot replace them.
FROM nvcr.io/nvidia/pytorch:25.12-py3

# The requirements of pyproject.toml but torch. --no-deps: megatron-core asks for torch by its PyPI name.
RUN pip install --no-cache-dir gguf huggingface-hub jinja2 matplotlib numpy orjson packaging protobuf psutil pydantic pyyaml rapidfuzz regex rich \
        safetensors scipy sentencepiece tenacity tensorboard tokenizers typer xxhash transformers==5.23.0 \
    && pip install --no-cache-dir --no-deps megatron-core==0.16.1

COPY pyproject.toml setup.py README.md LICENSE /opt/srlm-mega/
COPY srlm_mega /opt/srlm-mega/srlm_mega
COPY kernels /opt/srlm-mega/kernels
COPY launch /opt/srlm-mega/launch
COPY tools /opt/srlm-mega/tools
COPY checkpoints_conversion /opt/srlm-mega/checkpoints_conversion
RUN pip install --no-cache-dir --no-deps /opt/srlm-mega

# A working directory's folders named kernels or tools are not for other packages to import.
ENV PYTHONSAFEPATH=1
