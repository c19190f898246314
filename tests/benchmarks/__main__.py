"""Print what each micro-benchmark costs."""

from tests.benchmarks.micro import BENCHMARKS, measure

if __name__ == "__main__":
    width = max(len(benchmark.name) for benchmark in BENCHMARKS)
    print(f"{'':{width}}  {'µs each':>9}  {'each second':>13}")
    for benchmark in BENCHMARKS:
        seconds = measure(benchmark, 0.3)
        print(f"{benchmark.name:{width}}  {seconds * 1e6:9.2f}  {1 / seconds:13,.0f}")
