"""The key that the user may have meant by one that does not exist: a misspelt one, or another project's name for it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from ddk_ds.config.keys import all_keys, section_of
from ddk_ds.config.run_config import Config

# Names in Hugging Face's Trainer and TRL, axolotl, llm-foundry, Megatron, DeepSpeed and Lightning, without "_" and "-".
_ELSEWHERE = {
    "optimizer.learning_rate": "lr peaklr maxlr baselr",
    "optimizer.min_learning_rate": "minlr lrmin etamin endlr",
    "optimizer.warmup_steps": "warmup numwarmupsteps lrwarmupsteps lrwarmupiters warmupiters warmupratio twarmup",
    "optimizer.schedule": "lrschedulertype lrscheduler scheduler lrdecaystyle decaystyle",
    "optimizer.decay_steps": "numdecaysteps lrwsddecaysteps wsddecaysteps",
    "optimizer.betas": "adambeta1 adambeta2 beta1 beta2 adambetas",
    "optimizer.eps": "adamepsilon adameps epsilon",
    "optimizer.weight_decay": "wd decay",
    "optimizer.clip_norm": "maxgradnorm gradclip clipgrad gradientclipping gradientclipval maxnorm clipping",
    "optimizer.offload": "cpuoffload offloadoptimizer optimizeroffload",
    "train.global_batch_samples": "batchsize globalbatchsize totalbatchsize trainbatchsize globaltrainbatchsize "
    "gradientaccumulationsteps gradientaccumulation gradaccum accumulategradbatches",
    "train.micro_batch_samples": "microbatchsize perdevicetrainbatchsize perdevicebatchsize microbatch "
    "trainmicrobatchsizepergpu devicetrainmicrobatchsize",
    "train.precision": "bf16 fp16 fp32 dtype torchdtype mixedprecision amp",
    "stop.steps": "maxsteps numsteps totalsteps trainsteps trainiters maxiters iterations numtrainsteps maxduration",
    "stop.data_once": "epochs numepochs epoch numtrainepochs maxepochs",
    "data.sequence_length": "seqlen seqlength sequencelen maxseqlength maxseqlen maxlength blocksize contextlength",
    "data.validation_samples": "evalsamples maxevalsamples validationsize evalsize evaliters",
    "data.path": "dataset datasets datasetname datapath datadir traindata trainfile datafiles",
    "data.download_patience_s": "downloadretry downloadretries",
    "data.num_workers": "dataloadernumworkers workers",
    "student.path": "model modelname modelnameorpath modelpath basemodel studentmodel studentmodelnameorpath "
    "pretrained",
    "teacher.path": "teachermodel teachermodelnameorpath teachermodelname",
    "student.gradient_checkpointing": "activationcheckpointing recompute gradcheckpointing",
    "student.attn_implementation": "attn attnimpl flashattention flashattn useflashattention",
    "student.offload_params": "offloadparam paramoffload",
    "student.offload_activations": "activationoffload activationoffloading cpuactivations cpuoffloadactivations",
    "output_dir": "outdir savedir savefolder workdir output logdir",
    "name": "runname experiment experimentname wandbname",
    "checkpoint.every_steps": "savesteps saveinterval saveevery savefreq checkpointevery",
    "checkpoint.keep_last": "savetotallimit keepcheckpoints",
    "checkpoint.resume": "resumefromcheckpoint autoresume",
    "init_from": "loadcheckpoint loadpath load",
    "mixture.interval_steps": "evalsteps evalinterval evaluationinterval evalevery interval",
    "mixture.proportions": "domainweights mixtureweights datasetweights weights probs probabilities",
    "loss.gamma": "kdalpha alphakd lambda lmbda kdweight klweight kdratio distillweight kdlossweight",
    "loss.temperature": "kdtemperature temp tau",
    "loss.coefficient": "beta jsdbeta",
    "loss.divergence": "kdloss lossfn distillloss objective",
    "monitor.wandb_project": "wandb usewandb reportto",
    "monitor.tensorboard": "loggingdir tb usetensorboard",
    "deepspeed": "dsconfig deepspeedconfig zerostage zero zerooptimization",
    "mixture.controller": "sampler sampling strategy",
}
_BY_NAME = {name: key for key, names in _ELSEWHERE.items() for name in names.split()}
_CLOSE = 0.75


def suggestions(root: type[BaseModel], key: str) -> list[str]:
    """Return the dotted keys of `root` that an unknown dotted key may stand for, the likeliest first; [] if none."""
    keys = [known for known, _ in all_keys(root)]
    section, _, name = key.rpartition(".")
    sections = dict.fromkeys(known.rpartition(".")[0] for known in keys)
    for meant in difflib.get_close_matches(section, [item for item in sections if item != section], n=1):
        if f"{meant}.{name}" in keys:
            return [f"{meant}.{name}"]
    here = [known for known in keys if known.rpartition(".")[0] == section]
    plain = _plain(name)
    same = [known for known in keys if known.rpartition(".")[2] == name.lower().replace("-", "_")]
    near_here = difflib.get_close_matches(name, [known.rpartition(".")[2] for known in here], n=1, cutoff=_CLOSE)
    if near_here:
        return [f"{section}.{near_here[0]}" if section else near_here[0]]
    if same:
        return same
    if plain in _BY_NAME and _BY_NAME[plain] in keys:
        return [_BY_NAME[plain]]
    names = {_plain(known.rpartition(".")[2]): known for known in reversed(keys)}
    near = difflib.get_close_matches(plain, names, n=1, cutoff=_CLOSE)
    if near:
        return [names[near[0]]]
    distant = difflib.get_close_matches(name, [known.rpartition(".")[2] for known in here], n=1, cutoff=0.6)
    return [f"{section}.{distant[0]}" if section else distant[0] for _ in distant]


def did_you_mean(root: type[BaseModel], key: str, value: Any, ending: str = "") -> str:
    """Return the words about an unknown dotted key: the keys that the user may have meant, or those of its section.

    If the key is a section that does not exist, `value` holds its keys and each of them is looked for. `ending` follows
    each key that is named.
    """
    inner = list(_inner_keys(key, value))
    found = {item: near for item in inner if (near := suggestions(root, item))}
    if found and inner:
        return "did you mean " + ", ".join(f"{near[0]}{ending} (for {item})" for item, near in found.items()) + "?"
    near_sections = difflib.get_close_matches(key, root.model_fields, n=1) if inner else []
    if near := near_sections or suggestions(root, key):
        return f"did you mean {' or '.join(f'{item}{ending}' for item in near)}?"
    return f"known keys: {', '.join(_known_keys(root, key.split('.')[:-1]))}"


def dashes_hint(message: str) -> str:
    """Return the words that end argparse's error about unknown options: the overrides that they may stand for."""
    head, _, options = message.partition("unrecognized arguments: ")
    hint = ""
    for key, value in re.findall(r"(?<!\S)--?([A-Za-z_][\w.-]*)(?:=(\S*))?", "" if head else options):
        keys = [known for known, _ in all_keys(Config)]
        near = [key] if key in keys else suggestions(Config, key.replace("-", "_"))
        if near:
            hint += f"\na value of the configuration is written without dashes: {near[0]}={value or '...'}"
    return hint


def _inner_keys(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _inner_keys(f"{key}.{name}", item) if isinstance(item, dict) and item else [f"{key}.{name}"]


def _known_keys(root: type[BaseModel], sections: Sequence[str]) -> list[str]:
    for name in sections:
        root = section_of(root.model_fields[name]) or root
    return list(root.model_fields)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
