# docker build -t trainer .
# docker run --rm --init --gpus all --ipc host --stop-timeout 120 -v "$PWD/run:/mnt/run" trainer \
#     python -m refocused.run.launch --standalone --nproc_per_node=gpu train.py configs/production.py resume=latest \
#     data_dir=/mnt/run/data cache_dir=/mnt/run/cache output_dir=/mnt/run/checkpoints logging_dir=/mnt/run/logs
# --gpus all needs the NVIDIA container toolkit on the host; without it the container trains on the CPU, in one process.
# --ipc host: NCCL's shared memory is more than the 64 MB that a container gets.
FROM python:3.12-slim

# the compiler is for torch.compile; checkpoints ask git for the commit they were made with
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*

WORKDIR /trainer
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY *.py ./
COPY configs configs
COPY refocused refocused

# the demo: a small model on the text of Python's own sources
CMD ["sh", "-c", "python data.py demo && exec python -m refocused.run.launch --standalone --nproc_per_node=1 train.py configs/demo.py"]
