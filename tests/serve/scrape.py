"""What `/metrics` says, read by a parser that hasten does not use."""

import dataclasses

import httpx
from prometheus_client.parser import text_string_to_metric_families


@dataclasses.dataclass(frozen=True)
class Scrape:
    """``kinds`` by family, under the names that Prometheus shows; ``samples`` by name and labels other than the model's."""

    kinds: dict[str, str]
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]

    def __getitem__(self, name: str) -> float:
        """The sum over labels."""
        found = [value for (sample, _), value in self.samples.items() if sample == name]
        assert found, name
        return sum(found)

    def of(self, name: str, **labels: str) -> float:
        return self.samples.get((name, frozenset(labels.items())), 0.0)

    def labels(self, name: str) -> set[str]:
        """Values of its labels."""
        return {value for (sample, labels) in self.samples if sample == name for _, value in labels}


def scrape(url: str, **settings) -> Scrape:
    answer = httpx.get(f"{url}/metrics", timeout=10, **settings)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    kinds, samples = {}, {}
    for family in text_string_to_metric_families(answer.text):
        kinds[family.name + "_total" * (family.type == "counter")] = family.type
        for sample in family.samples:
            labels = frozenset((name, value) for name, value in sample.labels.items() if name != "model_name")
            assert (sample.name, labels) not in samples
            samples[sample.name, labels] = sample.value
    return Scrape(kinds, samples)
