"""transformers' `generate`, asked over standard input: see benchmarks/peer_process. Arguments: MODEL THREADS."""

import sys
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    torch.set_num_threads(int(sys.argv[2]))
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    print("READY", flush=True)
    for line in sys.stdin:
        concurrency, prompt_tokens, output_tokens = map(int, line.split())
        seconds = []
        for num_tokens in (1, output_tokens):
            token_ids = torch.randint(model.config.vocab_size, (concurrency, prompt_tokens))
            begin = time.perf_counter()
            with torch.inference_mode():
                model.generate(
                    token_ids,
                    attention_mask=torch.ones_like(token_ids),
                    max_new_tokens=num_tokens,
                    min_new_tokens=num_tokens,
                    do_sample=False,
                )
            seconds.append(time.perf_counter() - begin)
        print("RESULT", *seconds, flush=True)


if __name__ == "__main__":
    main()
