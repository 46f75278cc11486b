"""What a run reads: the model, the rows, the secrets."""

from collections.abc import Iterator

from grpo.config import Config
from grpo.config.paths import is_hub_data, is_hub_model
from grpo.config.text import clean
from grpo.data.prompts import Loaded, eval_sources, load_data, load_tokenizer, train_sources
from grpo.data.rendering import Rendering
from grpo.data.sources import place
from grpo.errors import GrpoError
from grpo.plan.preflight.facts import Facts
from grpo.plan.preflight.model import unusable
from grpo.plan.preflight.network import hub_error, site_error
from grpo.plan.preflight.nodes import role_packages
from grpo.plan.preflight.site import Site
from grpo.plan.preflight.verdict import Check, Problem, judge
from grpo.rewards.http import HttpRewards
from grpo.rewards.registry import RewardScorer

SHOWN_CHARACTERS, SHOWN_IDS = 2000, 64
EXAMPLE = [{"role": "user", "content": "What is 1 + 1?"}]


def model(site: Site) -> Check:
    """On every node that loads it, and here, where the tokenizer is loaded; a folder must be the same everywhere."""
    everyone = [("driver", site.driver), *((node.name, facts) for node, facts in site.known())]
    problems = [
        Problem("failed", name, f"{facts.model.found}: {facts.model.problem}")
        for name, facts in everyone
        if facts.model.problem
    ]
    if not problems and site.driver.model.cached:  # by config.json again: now the device is known
        problems += [Problem("failed", "", text) for text in filter(None, [unusable(site.config, site.device)])]
    whole = [(name, facts) for name, facts in everyone if facts.model.identity]
    problems += [
        Problem("failed", name, f"other files ({facts.model.found}) than {whole[0][0]}")
        for name, facts in whole
        if facts.model.identity != whole[0][1].model.identity
    ]
    path = "mount the folder there" if not is_hub_model(site.config.model.path) else "open the way to the hub"
    found = whole[0][1].model.found if whole else site.driver.model.found
    return judge("model", problems, found, f"{path}, or correct model.path")


def data(site: Site) -> list[Check]:
    """Every row as the run will read it, and one prompt as the model will see it; the hub's rows are not loaded."""
    config = site.config
    unseen = Check("data", "warning", "not looked at without the model's tokenizer")
    if site.driver.model.problem and is_hub_model(config.model.path):
        return [unseen]  # it would be asked again and again
    try:
        tokenizer = load_tokenizer(config)
    except GrpoError as error:
        return [unseen if site.driver.model.problem else Check("data", "failed", str(error))]
    try:
        sources = [*train_sources(config), *eval_sources(config)]
        rendering = Rendering(config, tokenizer)
        hub = [f"{place(one)} at {(one.revision or '')[:12]} on the hub" for one in sources if is_hub_data(one.path)]
        if hub:
            (ids,) = rendering.encode([EXAMPLE])
            return [_on_hub(hub), _prompt(rendering, ids, "of a made-up row, ")]
        train, held_out = load_data(config, rendering)
    except GrpoError as error:
        return [judge("data", [Problem("failed", "", str(error))], "")]
    problems = [Problem("warning", "", note) for note in (*train.notes, *held_out.notes)]
    if skipped := train.skipped + held_out.skipped:
        problems.append(Problem("warning", "", f"{skipped} bad rows are skipped"))
    told = ", ".join(filter(None, [_rows(train, "to train on"), _rows(held_out, "held out")]))
    return [judge("data", problems, told, f"({told})"), _prompt(rendering, train.prompts[0].token_ids)]


def _rows(loaded: Loaded, what: str) -> str:
    return f"{len(loaded.prompts)} prompts {what}" if loaded.prompts else ""


def _on_hub(told: list[str]) -> Check:
    error_text = hub_error()
    lost = f"{error_text}, so only what is in its cache can be read"
    return judge("data", [Problem("warning", "driver", lost)] if error_text else [], ", ".join(told))


def _prompt(rendering: Rendering, ids: object, of: str = "") -> Check:
    """One prompt as it is rendered, with its ids."""
    if not isinstance(ids, tuple):
        return Check("prompt", "failed", f"{of}{getattr(ids, 'text', ids)}")
    text, shown = rendering.decode(ids), ", ".join(map(str, ids[:SHOWN_IDS]))
    cut, more = "..." * (len(text) > SHOWN_CHARACTERS), ", ..." * (len(ids) > SHOWN_IDS)
    return Check("prompt", "ok", f"{of}{len(ids)} tokens: {clean(text[:SHOWN_CHARACTERS])}{cut} [{shown}{more}]")


def services(config: Config) -> list[Check]:
    """Whether the driver has the tokens of reward services and reaches them; nothing is asked."""
    problems, told = [], []
    for reward in config.all_rewards:
        if reward.url is None:
            continue
        told.append(reward.name)
        try:
            HttpRewards(config, [reward])
        except GrpoError as error:
            problems.append(Problem("failed", "driver", str(error)))
        if config.reward_http.proxy is None and (error_text := site_error(reward.url)):
            problems.append(Problem("failed", "driver", f"{reward.url}: {error_text}"))
    way_out = "start the service, open the way to it or correct rewards"
    return [judge("rewards", problems, f"reached: {', '.join(told)}", way_out)] if told else []


def reward_code(config: Config) -> list[Check]:
    """Imports the user's functions as the run will, behind the same fence."""
    own = tuple(reward for reward in config.all_rewards if reward.url is None)
    one = config.reward_code.model_copy(update={"workers": 1})
    plain = config.data.model_copy(update={"sources": ()})
    problems = []
    try:
        with RewardScorer(config.model_copy(update={"rewards": own, "reward_code": one, "data": plain})) as scorer:
            functions = scorer.user_functions
            if scorer.isolation:
                problems.append(Problem("warning", "driver", "runs without a fence (reward_code.isolation: none)"))
    except GrpoError as error:
        functions = ["failed"]
        problems.append(Problem("failed", "driver", str(error)))
    return [judge("reward code", problems, f"imported behind its fence: {', '.join(functions)}")] if functions else []


def secrets(site: Site) -> Check:
    """Whether they are where they are needed; what they say stays where it is."""
    config, driver = site.config, site.driver
    problems, told = [], []
    problems += [
        Problem("failed", "driver", f"{package} is not installed, but metrics.* names its server")
        for package in role_packages(config)
        if package not in driver.versions
    ]
    if config.metrics.wandb_project is not None:
        told.append("wandb")
        if "wandb" not in driver.secrets:
            problems.append(Problem("failed", "driver", "no W&B key: set WANDB_API_KEY or WANDB_MODE=offline"))
    on_hub = is_hub_model(config.model.path) or any(is_hub_data(one.path) for one in train_sources(config))
    in_bucket = any((goal or "").startswith("s3://") for goal in (config.checkpoint.dir, config.run.results))
    for name, needed, missing in (
        ("huggingface", on_hub, "no Hugging Face token (HF_TOKEN): enough for what is public"),
        ("s3", in_bucket, "no S3 credentials: a role of the pod may do"),
    ):
        if needed:
            told.append(name)
            lacking = [who for who, facts in _users(site, name) if name not in facts.secrets]
            problems += [Problem("warning", who, missing) for who in lacking]
    return judge("secrets", problems, f"there: {', '.join(told)}" if told else "none needed")


def _users(site: Site, secret: str) -> Iterator[tuple[str, Facts]]:
    """Who needs a secret: all for the model, driver and ranks for checkpoints."""
    yield "driver", site.driver
    for node, facts in site.known() if secret == "huggingface" else site.of("trainer"):
        yield node.name, facts
