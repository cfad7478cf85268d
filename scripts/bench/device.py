"""What bounds a training step here: the device and the rate of its matrix product, as a JSON
object. Needs torch.

The best of six timings of a square product, FLOP per second: wall time of the GPU, CPU time of the
threads otherwise.
"""

import argparse
import json
import time

import torch

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
SIZE = {"cuda": 8192, "cpu": 1024}
PRODUCTS, TIMINGS = 20, 6


def matmul_rate(device, dtype):
    size = SIZE[device]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    wait, clock = (torch.cuda.synchronize, time.perf_counter) if device == "cuda" else (lambda: None, time.process_time)
    seconds = []
    for _ in range(TIMINGS):
        wait()
        start = clock()
        for _ in range(PRODUCTS):
            a @ b
        wait()
        seconds.append(clock() - start)
    return 2 * size**3 * PRODUCTS / min(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, f32 on the CPU")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = args.dtype or ("bf16" if device == "cuda" else "f32")
    report = {"device": device, "torch": torch.__version__, "dtype": dtype, "matmul_flops": matmul_rate(device, DTYPES[dtype])}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        report |= {"gpu": properties.name, "gpus": torch.cuda.device_count(),
                   "memory_gb": properties.total_memory / 1e9, "cuda": torch.version.cuda}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
