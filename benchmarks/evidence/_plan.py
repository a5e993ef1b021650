"""What `jobs.py` runs, in which order."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Job:
    """A program with its arguments.

    - `room`: 2 for a GPU of its own, 1 where two share it.
    - `least`: the seconds in which it comes to its first result on an H100.
    - `group`: jobs of one group do not run at the same time.
    - `writes`: the last files that it writes. With all of them there, it is done.
    """

    name: str
    program: str
    arguments: tuple[str, ...]
    room: int
    least: float
    group: str
    writes: tuple[pathlib.Path, ...]
    log: pathlib.Path

    def is_done(self) -> bool:
        return all(path.exists() for path in self.writes)

    def last_words(self, lines: int = 8) -> str:
        return "\n".join(self.log.read_text().splitlines()[-lines:])


OPTIMIZERS = ("adamw", "lion", "sgd")
CONTENDERS = ("float32", "ours", "flashoptim", "bfloat16")
LAST_BITS = "float32-last-bits"


def plan(data: pathlib.Path, out: pathlib.Path, small: bool) -> list[Job]:
    if not small:
        return [*_jobs(data, out)]
    # `quality.py` has no smaller size.
    return [
        dataclasses.replace(job, least=0.0, arguments=(*job.arguments, "--small"))
        for job in _jobs(data, out)
        if not job.name.startswith("quality")
    ]


def _jobs(data: pathlib.Path, out: pathlib.Path) -> Iterator[Job]:
    """The number of seeds is fixed here: five of the two contenders whose gap is to be
    known best, and three of the others."""

    def job(
        kind: str, cell: str, room: int, least: float, files: list[str], **of: str
    ) -> Job:
        """`files`: the ends of their names, after the cell."""
        chosen = {"data": str(data), "out": str(out / kind), **of}
        name = f"{kind}-{cell}"
        label = f"{name}{files[0]}" + (f"-{files[-1][-1]}" if len(files) > 1 else "")
        return Job(
            name=label,
            program=f"{kind}.py",
            arguments=tuple(x for k, v in chosen.items() for x in (f"--{k}", v)),
            room=room,
            least=least,
            group=name,
            writes=tuple(out / kind / f"{cell}{file}.json" for file in files),
            log=out / "logs" / f"{label}.log",
        )

    def gpt2(optimizer: str, contender: str, first: int, last: int) -> Job:
        files = [f"-seed-{seed}" for seed in range(first, last + 1)]
        cell, seeds = f"{optimizer}-{contender}", f"{first}-{last}"
        of = {"optimizer": optimizer, "contender": contender, "seeds": seeds}
        return job("gpt2", cell, 2, 75.0, files, **of)

    def at_rate(
        optimizer: str, contender: str, rate: str, last: int = 2, b2: str = ""
    ) -> Job:
        files = [f"-seed-{seed}" for seed in range(last + 1)]
        of = {"optimizer": optimizer, "contender": contender, "seeds": f"0-{last}"}
        of |= {"rate": rate, **({"b2": b2} if b2 else {})}
        cell = f"{optimizer}-{contender}-at-{rate}" + (f"-b2-{b2}" if b2 else "")
        return job("gpt2", cell, 2, 60.0, files, **of)

    def longer(optimizer: str, contender: str, first: int, last: int) -> Job:
        steps, seeds = "1500", f"{first}-{last}"
        files = [f"-seed-{seed}" for seed in range(first, last + 1)]
        of = {"optimizer": optimizer, "contender": contender, "seeds": seeds}
        cell = f"{optimizer}-{contender}-{steps}-steps"
        return job("gpt2", cell, 2, 90.0, files, **of, steps=steps)

    def images(
        model: str, optimizer: str, contender: str, seeds: str = "", max_norm: str = ""
    ) -> Job:
        of = {"model": model, "optimizer": optimizer, "contender": contender}
        cell = "-".join(of.values())
        if max_norm:
            cell, of = f"clipped-{cell}", {**of, "max-norm": max_norm}
        if not seeds:
            return job("images", cell, 1, 100.0, ["-seeds"], **of)
        # Twelve of the larger models take a GPU of their own.
        room, least = (1, 40.0) if model == "cnn" else (2, 100.0)
        more = {"seeds": seeds}
        return job("images", cell, room, least, [f"-seeds-{seeds}"], **of, **more)

    def long(case: str, optimizer: str, contender: str) -> Job:
        of = {"case": case, "optimizer": optimizer, "contender": contender}
        return job("long", "-".join(of.values()), 1, 120.0, [""], **of)

    def finetune(optimizer: str, contender: str) -> Job:
        rates = ("1e-05", "0.0001")
        files = [f"-at-{x}-seed-{seed}" for seed in range(3) for x in rates]
        of = {"optimizer": optimizer, "contender": contender}
        return job("finetune", "-".join(of.values()), 2, 120.0, files, **of)

    def quality(name: str, least: float, *of: str) -> Job:
        file = out / "quality" / f"{name}.json"
        text = ("--text", str(data / "speeches.txt"), "--json", str(file))
        label = f"quality-{name}"
        log = out / "logs" / f"{label}.log"
        return Job(label, "../quality.py", (*text, *of), 1, least, label, (file,), log)

    both, others = CONTENDERS[:2], CONTENDERS[2:]
    for optimizer, contender in itertools.product(OPTIMIZERS, both):
        yield gpt2(optimizer, contender, 0, 4)
    for optimizer in OPTIMIZERS:
        yield gpt2(optimizer, others[0], 0, 2)
    # Lion's choice of a rate was a toss-up: contenders that chose another one than
    # float32 are also run at its rate, and float32 at theirs.
    yield at_rate("lion", "ours", "0.0001", last=4)
    yield at_rate("lion", "flashoptim", "0.0001")
    yield at_rate("lion", "float32", "0.0003")
    # A pilot: how much its gaps deviate says how many more there must be.
    for contender in both:
        yield gpt2("muon", contender, 0, 2)
    for optimizer, contender in itertools.product(OPTIMIZERS, both):
        yield longer(optimizer, contender, 0, 2)
    # Those of SGD deviate by 0.0087 nats, which makes the 95 % interval 0.021 wide each
    # way. With six it is 0.009.
    for contender in both:
        yield longer("sgd", contender, 3, 5)
    # The pilot's gaps are 0.0102 with a deviation of 0.0047 nats: ten seeds make the
    # 95 % interval 0.0034 wide each way, which tells 0.0102 from 0.015.
    for contender in both:
        yield gpt2("muon", contender, 3, 9)
    # The ten deviate by 0.0127 around 0.0066: with five more, the interval is 0.0070
    # wide each way, and ends below 0.015 if the mean stays.
    for contender in both:
        yield gpt2("muon", contender, 10, 14)
    # The 8 bits of a momentum are what makes the largest update larger.
    yield gpt2("muon", "ours-16-bit-momentum", 0, 2)
    yield gpt2("adamw", others[1], 0, 2)
    # With the paper's codec, AdamW was better than in float32.
    yield at_rate("adamw", "flashoptim-v", "0.0003")
    # Is it by what is stored as zero? And is it so at a rate between the two best?
    yield at_rate("adamw", "flashoptim-v-above-zero", "0.0003")
    for contender in CONTENDERS[:3]:
        yield at_rate("adamw", contender, "0.0005")
    # Small codes of the paper's second moments do not fall. Is that a longer average?
    for contender in CONTENDERS[:3]:
        yield at_rate("adamw", contender, "0.0003", b2="0.99")
    weights = ("ours", "float32", "ours-32", "bfloat16")
    for optimizer, contender in itertools.product(("adamw", "lion"), weights):
        yield finetune(optimizer, contender)
    # Six seeds deviate by 0.47 points with Lion, and 0.44 with SGD: 18 make the 95 %
    # interval 0.23 and 0.22 wide each way.
    for optimizer, contender in itertools.product(("lion", "sgd"), both):
        yield images("vit", optimizer, contender, "6-17")
    for optimizer, contender in itertools.product(OPTIMIZERS, CONTENDERS):
        yield images("vit", optimizer, contender)
    for contender in CONTENDERS:
        yield images("resnet", "adamw", contender)
    for contender in CONTENDERS:
        yield long("change", "adamw", contender)
    for case, contender in itertools.product(("sparse", "pruned"), both):
        yield long(case, "adamw", contender)
    for optimizer, contender in itertools.product(("sgd", "lion"), CONTENDERS):
        yield images("resnet", optimizer, contender)
    # Without clipping, SGD had a bad first epoch in one to three seeds of six.
    for contender in CONTENDERS:
        yield images("resnet", "sgd", contender, max_norm="1")
    # Where the largest update of a seed was more than 1.5 times float32's: does float32
    # from weights whose last bits differ do the same?
    for max_norm in ("1", ""):
        yield images("resnet", "sgd", LAST_BITS, max_norm=max_norm)
    yield gpt2("muon", LAST_BITS, 0, 4)
    for optimizer in ("lion", "sgd"):
        yield gpt2(optimizer, others[1], 0, 2)
    for case, contender in itertools.product(("sparse", "pruned"), others):
        yield long(case, "adamw", contender)
    # An image is 0.1 points of MNIST's test set. Differences of about 0.35 make the
    # 95 % interval of 24 seeds 0.15 wide each way.
    for optimizer, contender in itertools.product(OPTIMIZERS, CONTENDERS):
        yield images("cnn", optimizer, contender, "0-23")
    codecs = ("flashoptim", "default", "default, m alone", "default, v alone")
    yield quality("open-loop", 100.0, "--seeds", "4", "--codecs", *codecs)
    # Do the moments make the gap?
    yield at_rate("muon", "exact-moments", "0.003")
    # What the others do in more steps, and with Muon.
    for optimizer, contender in itertools.product(OPTIMIZERS, others):
        yield longer(optimizer, contender, 0, 2)
    for contender in others:
        yield gpt2("muon", contender, 0, 2)
    for contender in CONTENDERS:
        yield longer("muon", contender, 0, 2)
    # The gaps of ours deviate by 0.0116 nats, which makes the 95 % interval 0.029 wide
    # each way. With eight it is 0.0097.
    for contender in both:
        yield longer("muon", contender, 3, 7)
    # Do 16 bits of the momentum mend this one, too? With six, the interval is 0.012
    # wide each way.
    yield longer("muon", "ours-16-bit-momentum", 0, 2)
    yield longer("muon", "ours-16-bit-momentum", 3, 5)
    # The largest update of one seed was 1.85 times float32's.
    for more in ("", "6-17"):
        yield images("vit", "sgd", LAST_BITS, more)
    for optimizer, contender in itertools.product(("sgd", "lion"), CONTENDERS):
        yield long("change", optimizer, contender)
    yield quality("closed-loop", 150.0, "--closed-loop", "--seeds", "48")
