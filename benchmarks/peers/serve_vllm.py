"""vLLM's `LLM.generate`, asked over standard input: see benchmarks/peer_process. Argument: MODEL."""

import random
import sys
import time

from vllm import LLM, SamplingParams


def main() -> None:
    # No prefix is shared here, and looking for one is not the work.
    engine = LLM(sys.argv[1], dtype="bfloat16", max_model_len=2048, enable_prefix_caching=False)
    print("READY", flush=True)
    for line in sys.stdin:
        concurrency, prompt_tokens, output_tokens = map(int, line.split())
        seconds = []
        for num_tokens in (1, output_tokens):
            prompts = [
                {"prompt_token_ids": [random.randrange(100, 40000) for _ in range(prompt_tokens)]}
                for _ in range(concurrency)
            ]
            greedy = SamplingParams(temperature=0, max_tokens=num_tokens, min_tokens=num_tokens, ignore_eos=True)
            begin = time.perf_counter()
            engine.generate(prompts, greedy, use_tqdm=False)
            seconds.append(time.perf_counter() - begin)
        print("RESULT", *seconds, flush=True)


if __name__ == "__main__":
    main()
