"""JSON Schemas of rising size, made by a seeded generator; every one has outputs, and bounds on what random tokens can make of them."""

import random

WORDS = [
    "name",
    "id",
    "größe",
    "日付",
    "a b",
    "x-y",
    "value",
    "items",
    "0",
    "emoji 👍",
    'quo"te',
    "back\\slash",
    "Type",
    "$ref",
    "n\nl",
    "é",
]
PATTERNS = ["^[a-z]{1,6}$", "^[A-Z][0-9]{2,4}$", "^(red|green|blue)$", r"^\d{4}-\d{2}-\d{2}$", '^[^"\\\\]{0,5}$', "^(ab){1,3}c?$"]
LEAVES = ["string", "pattern", "integer", "number", "boolean", "null", "enum", "const", "nullable"]


def schemas(count, seed=0):
    """``count`` schemas; the first are leaves, the last have some thirty parts."""
    rng = random.Random(seed)
    for index in range(count):
        parts = 1 + index * 28 // count
        maker = _Maker(rng)
        schema = maker.made(parts, depth=0)
        if maker.defs and isinstance(schema, dict):
            schema = {**schema, "$defs": maker.defs}
        yield schema


class _Maker:
    def __init__(self, rng):
        self.rng, self.defs = rng, {}

    def made(self, parts, depth):
        """A schema of about so many parts."""
        if parts <= 1 or depth > 6:
            return self.leaf()
        kind = self.rng.choice(["object", "object", "object", "array", "tuple", "anyOf", "ref"])
        if kind == "array":
            least = self.rng.randrange(3)
            return {
                "type": "array",
                "items": self.made(min(parts - 1, 3), depth + 1),
                "minItems": least,
                "maxItems": least + self.rng.randrange(3),
            }
        pieces = self.split(parts - 1)
        if kind == "tuple":
            return {
                "type": "array", "prefixItems": [self.made(piece, depth + 1) for piece in pieces], "items": False,
                "minItems": self.rng.randint(0, len(pieces)),
            }  # fmt: skip
        if kind == "anyOf":
            return {"anyOf": [self.made(piece, depth + 1) for piece in pieces]}
        if kind == "ref":
            name = f"part{len(self.defs)}"
            self.defs[name] = None
            self.defs[name] = self.made(parts - 1, depth + 1)
            return {"$ref": f"#/$defs/{name}"}
        names = self.rng.sample(WORDS, min(len(pieces), len(WORDS)))
        return {
            "type": "object", "properties": {name: self.made(piece, depth + 1) for name, piece in zip(names, pieces)},
            "required": [name for name in names if self.rng.random() < 0.6], "additionalProperties": False,
        }  # fmt: skip

    def split(self, parts):
        pieces = []
        while parts > 0:
            pieces.append(self.rng.randint(1, max(1, parts // 2)))
            parts -= pieces[-1]
        return pieces or [1]

    def leaf(self):
        rng, kind = self.rng, self.rng.choice(LEAVES)
        if kind == "string":
            least = rng.randrange(4)
            return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(12)}
        if kind == "pattern":
            return {"type": "string", "pattern": rng.choice(PATTERNS)}
        if kind == "integer":
            low = rng.randint(-2000, 2000)
            return {"type": "integer", rng.choice(["minimum", "exclusiveMinimum"]): low, "maximum": low + 1 + rng.randrange(5000)}
        if kind == "number":
            return {"type": "number", "minimum": rng.choice([-1.5, 0, 10]), "exclusiveMaximum": rng.choice([10.25, 11, 1000])}
        if kind == "enum":
            return {"enum": rng.sample([1, "one", None, True, -2.5, "größe", '"', "", ["x", 1], {"k": "v"}, 10**9], rng.randint(1, 6))}
        if kind == "const":
            return {"const": rng.choice(WORDS + [0, [], {}, False])}
        if kind == "nullable":
            return {"type": ["integer", "null"], "minimum": 0, "maximum": 99}
        return {"type": kind}
