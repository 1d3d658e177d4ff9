"""A chat with an HFT model that says who answers, a task or the plain backbone, how likely that is, and why.

    python examples/space/app.py MODEL        # a folder or a Hub id; without it, HFT_MODEL

On a GPU the backbone is held in NF4 if bitsandbytes is installed, else in bfloat16, as on a CPU.
"""

import argparse
import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TextIteratorStreamer
from transformers.utils import is_bitsandbytes_available


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
import gradio as gr


ROUTER, BACKBONE = "the router decides", "backbone"  # no task can have a name with blanks in it
MAX_NEW_TOKENS = 256
# Who answered stands above the answer as the title of a "thought", which needs neither a frame nor a fold.
CSS = "#chat .thought-group {border: 0; padding: 0} #chat .thought-group :is(.arrow, .content) {display: none}"


def load(name: str) -> tuple[Any, Any]:
    """An HFT model and its tokenizer, by the package `hft` where it is installed, else by the code beside the model.

    Raises:
        ValueError: another kind of model.
        OSError: no model there.
    """
    with contextlib.suppress(ImportError):
        import hft  # noqa: F401
    kind = AutoConfig.from_pretrained(name, trust_remote_code=True).model_type
    if kind != "hft":
        raise ValueError(f"'{name}' is a plain {kind!r} without tasks; name an HFT model.")
    on_gpu, nf4 = torch.cuda.is_available(), None
    if on_gpu and is_bitsandbytes_available():
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype="bfloat16",
        )
    options = {"dtype": torch.bfloat16, "device_map": "auto" if on_gpu else None, "quantization_config": nf4}
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    except (OSError, ValueError):  # saved or pushed without one: it is the backbone's
        backbone, revision = model.config.backbone, model.config.backbone_revision
        tokenizer = AutoTokenizer.from_pretrained(backbone, revision=revision)
    return model.eval(), tokenizer


def tokenize(model: Any, tokenizer: Any, message: str, system: str) -> dict[str, torch.Tensor]:
    """A message as `input_ids` and `attention_mask` [1, T], in the chat template if there is one."""
    if not message.strip():
        raise gr.Error("The message is empty; type one.")
    if tokenizer.chat_template is None:
        batch = tokenizer(message, return_tensors="pt")
    else:
        chat = [{"role": "system", "content": system}] if system else []
        chat.append({"role": "user", "content": message})
        batch = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    num_tokens, longest = batch["input_ids"].shape[1], model.config.text_config.max_position_embeddings
    if num_tokens >= longest:
        raise gr.Error(f"The message makes {num_tokens} tokens; this model takes up to {longest - 1}. Shorten it.")
    return {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}


def decide(model: Any, inputs: dict[str, torch.Tensor], choice: str) -> tuple[str, str, dict[str, float]]:
    """Who answers; why, in words; the router's probabilities, none if it takes the prompt for no task's."""
    (route,) = model.route(**inputs)
    likely = dict(zip(route.names, route.probabilities, strict=True)) if route.novelty <= 1 else {}
    if choice == ROUTER:
        return route.task, route.reason, likely
    return choice, f"your choice; the router says {route.task}: {route.reason}", likely


def stream(model: Any, tokenizer: Any, inputs: dict[str, torch.Tensor], task: str) -> Iterator[str]:
    """The answer on a task's path, again and again, a little longer each time."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    room = model.config.text_config.max_position_embeddings - inputs["input_ids"].shape[1]
    left = threading.Event()

    def generate() -> None:
        options = {"max_new_tokens": min(MAX_NEW_TOKENS, room), "do_sample": False, "streamer": streamer}
        stop = [lambda ids, _scores: torch.full((len(ids),), left.is_set(), device=ids.device)]
        try:
            model.generate(**inputs, task=task, stopping_criteria=stop, **options)
        finally:
            streamer.end()  # also after an error, since somebody waits

    with ThreadPoolExecutor(1) as pool:
        writer, text = pool.submit(generate), ""
        try:
            for piece in streamer:
                text += piece
                yield text
        finally:
            left.set()  # who pressed the stop button listens no longer
        writer.result()  # raises what went wrong


def build_page(model: Any, tokenizer: Any, name: str) -> gr.Blocks:
    """The page: the chat, whose answers say who gave them, and beside it the switch and what the router thought."""

    def answer(message: str, _history: list[Any], choice: str, system: str) -> Iterator[tuple[Any, ...]]:
        inputs = tokenize(model, tokenizer, message, system)
        task, why, likely = decide(model, inputs, choice)
        who = {"content": "", "metadata": {"title": f"{task} ({why})"}}
        bars = gr.Label(likely, visible=bool(likely))
        for text in stream(model, tokenizer, inputs, task):
            yield [who, {"content": text}], bars

    with gr.Blocks(title=f"HFT: {name}", fill_height=True) as page:
        gr.Markdown(f"## {name}\nEach message is answered by itself: what was said before is not read again.")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                names = [ROUTER, BACKBONE, *model.hierarchy.names]
                choice = gr.Radio(names, value=ROUTER, label="Who shall answer", elem_id="choice")
                bars = gr.Label(label="The router's guess", num_top_classes=4, show_heading=False, visible=False)
                info = "The one that the tasks were trained with; empty: the chat template's own."
                system = gr.Textbox(os.environ.get("HFT_SYSTEM", ""), label="System message", info=info)
                with gr.Accordion("The tasks", open=False):
                    gr.Markdown(f"```\n{model.hierarchy.draw()}\n```")
            with gr.Column(scale=3):  # not as Markdown, which would eat the stars of "2 * 3 * 4"
                options = {"render_markdown": False, "show_label": False, "buttons": ["copy"], "height": "65vh"}
                chat = gr.Chatbot(elem_id="chat", **options)
                gr.ChatInterface(answer, chatbot=chat, additional_inputs=[choice, system], additional_outputs=bars)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=os.environ.get("HFT_MODEL"), help="a folder or a Hub id")
    name = parser.parse_args().model
    if not name:
        parser.error("which model? Give a folder or a Hub id, or set HFT_MODEL.")
    model, tokenizer = load(name)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from outside
    page = build_page(model, tokenizer, name)
    page.launch(theme=gr.themes.Soft(**fonts), css=CSS)


if __name__ == "__main__":
    main()
