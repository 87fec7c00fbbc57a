"""Compile the reference GPT-2 to a spiking network; print quality and energy. Takes about half a minute."""

from pathlib import Path

import ntc
from ntc.text import tokens_from

HERE = Path(__file__).parent

compiled = ntc.compile(HERE / "gpt2-books", steps=4)
tokens = tokens_from(HERE / "data" / "books-sample.txt", compiled.tokenizer, window=256, max_tokens=2048)
quality = ntc.evaluate(compiled.program, compiled.analog, tokens)
energy = ntc.measure_energy(compiled.program, compiled.analog, tokens).to_json()
print(f"perplexity      {quality.perplexity_ann:.1f} -> {quality.perplexity:.1f}, without fine-tuning")
print(f"spikes          {quality.events_per_value:.2f} per value, T = {quality.steps}")
for part in ("attention", "total"):
    print(f"energy          {energy[part]['reduction']:.1%} less, {part} (arithmetic only, 45 nm)")
