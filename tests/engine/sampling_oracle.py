"""What sampling means, written plainly in NumPy with whole sorts: the oracle of the native sampler."""

import numpy as np

ROUNDS = 10


def philox(counter, key):
    """Philox4x32-10 (Salmon et al., SC 2011, section 3.2) of counters uint64 [..., 4] below 2³² and a key of two such words."""
    c = [np.asarray(counter[..., i], np.uint64) for i in range(4)]
    k = [int(word) for word in key]
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(ROUNDS):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> shift) ^ c[1] ^ np.uint64(k[0]), b & mask, (a >> shift) ^ c[3] ^ np.uint64(k[1]), a & mask]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return np.stack(c, axis=-1)


def noise(seed, choice, position, purpose, n):
    """Uniform noise float64 [n]."""
    blocks = -(-n // 4)

    def words(half):
        counter = np.empty((blocks, 4), np.uint64)
        counter[:, 0] = np.arange(blocks) + half
        counter[:, 1:] = position, choice, purpose
        return philox(counter, (seed % 2**32, seed >> 32)).reshape(-1)[:n]

    word = words(0) << np.uint64(32) | words(2**31)
    return ((word >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def changed(logits, params, prompt, output, *, bias=(), allowed=None):
    """Logits after mask, bias and penalties, float32 [vocab]; ``allowed`` is bool [vocab]."""
    row = np.asarray(logits, np.float32).copy()
    if allowed is not None:
        row[~allowed] = -np.inf
    wide = row.astype(np.float64)
    for token, value in bias:
        if 0 <= token < row.size:
            wide[token] += value
    for token in range(row.size):
        count = list(output).count(token) if output else 0
        if count or token in prompt:
            wide[token] = wide[token] / params.repetition_penalty if wide[token] > 0 else wide[token] * params.repetition_penalty
        if count:
            wide[token] -= params.frequency_penalty * count
            wide[token] -= params.presence_penalty
    touched = np.isfinite(row)
    row[touched] = np.clip(wide[touched], -np.finfo(np.float32).max, np.finfo(np.float32).max).astype(np.float32)
    return row


def survivors(row, params):
    """Ids that may be drawn, ascending, and their log-weights, from logits after `changed`; the likeliest alone at temperature 0."""
    ranked = np.lexsort((np.arange(row.size), -row.astype(np.float64)))
    ranked = ranked[row[ranked] > -np.inf]
    if params.temperature == 0:
        return ranked[:1], np.zeros(1)
    with np.errstate(over="ignore"):
        weights = (row.astype(np.float64) - np.float64(row[ranked[0]])) * min(1 / np.float64(params.temperature), np.finfo(np.float64).max)
    if params.top_k:
        ranked = ranked[: params.top_k]
    if params.top_p < 1:
        mass = np.exp(weights[ranked])
        reached = np.cumsum(mass)
        ranked = ranked[: np.searchsorted(reached, params.top_p * reached[-1]) + 1]
    if params.min_p > 0:
        ranked = ranked[np.exp(weights[ranked]) >= params.min_p]
    kept = np.sort(ranked[weights[ranked] > -np.inf])
    return kept, weights[kept]


def sample(row, params, seed, choice, position, purpose=0):
    """The drawn id, and by how much its score leads the next one's."""
    ids, weights = survivors(row, params)
    scores = weights - np.log(-np.log1p(-noise(seed, choice, position, purpose, row.size)[ids]))
    ahead = np.sort(scores)[::-1]
    return int(ids[np.argmax(scores)]), ahead[0] - ahead[1] if len(ids) > 1 else np.inf
