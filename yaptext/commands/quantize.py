"""`yap-text quantize`: the quantizer, from its options to its exit status."""

from __future__ import annotations

import argparse
import sys

from yaptext.commands import startup_logs
from yaptext.errors import QuantizeError, YapError
from yaptext.settings import Settings
from yaptext.settings.table import variables


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    quantize = commands.add_parser(
        "quantize",
        help="make 4-bit AWQ weights of the deployed models",
        description="Quantizes CHAT_MODEL and TOOL_MODEL to 4-bit AWQ, measures the result and keeps it where `serve` "
        "finds it; with HF_AWQ_PUSH=1 it is also uploaded to the hub. A model that is finished, or that failed before, "
        "is not quantized again until a setting, the model or the code changes.",
        epilog="The result is a folder in STATE/awq/NAME-HASH/, named by its time (UTC); the newest one is used. STATE "
        "is YAP_TEXT_STATE_DIR (default: STATE_DIRECTORY under systemd, else ~/.local/state/yap-text). Exit status: 2 "
        "if something must be corrected, 75 if a later try may succeed (hub, disk, another job), 130 after Ctrl-C, 1 "
        "after a crash.",
    )
    default = {name: value for name, value, _ in variables()}

    def option(flag: str, metavar: str, name: str, meaning: str, usual: str | None = None) -> None:
        quantize.add_argument(flag, metavar=metavar, help=f"{name}: {meaning} (default: {usual or default[name]})")

    quantize.add_argument("--role", choices=("chat", "tool"), help="only this model (default: those of DEPLOY_MODELS)")
    option("--calibration", "TEXT", "AWQ_CALIBRATION", "builtin, a .txt or .jsonl file, a folder of them, or hub:NAME")
    option(
        "--samples",
        "N",
        "AWQ_CALIBRATION_SAMPLES",
        "calibration samples, 1 to 4096; up to 4 more are set aside to measure on",
        "128 on CUDA, 8 on CPU",
    )
    option("--tokens", "N", "AWQ_CALIBRATION_TOKENS", "tokens of one sample, 64 to 8192")
    option("--group-size", "N", "AWQ_GROUP_SIZE", "weights that share a scale: auto, 128, 64 or 32")
    option(
        "--quantizer", "LIBRARY", "QUANTIZER", "autoawq, llmcompressor, or auto: autoawq if it is right for the model"
    )
    quantize.add_argument("--force", action="store_true", help="redo what is finished")
    quantize.add_argument("--again", action="store_true", help="retry what failed before, although nothing has changed")
    quantize.add_argument("--allow-worse", action="store_true", help="keep a result that is worse than plain rounding")
    quantize.add_argument("--when-wanted", action="store_true", help="do nothing unless QUANTIZATION=awq asks for it")
    quantize.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    flags = {
        "DEPLOY_MODELS": parsed.role,
        "AWQ_CALIBRATION": parsed.calibration,
        "AWQ_CALIBRATION_SAMPLES": parsed.samples,
        "AWQ_CALIBRATION_TOKENS": parsed.tokens,
        "AWQ_GROUP_SIZE": parsed.group_size,
        "QUANTIZER": parsed.quantizer,
    }
    settings = Settings.load(**{name: value for name, value in flags.items() if value is not None})
    startup_logs.start(settings)
    import structlog

    from yaptext.quantize import job

    options = job.Options(
        force=parsed.force,
        again=parsed.again,
        when_wanted=parsed.when_wanted,
        allow_worse=parsed.allow_worse,
        terminal=settings.log_format != "json" and sys.stderr.isatty(),
    )
    try:
        job.run(settings, options)
    except YapError:
        raise
    except Exception as error:
        structlog.get_logger(__name__).exception("quantize.crashed")
        raise QuantizeError(f"it crashed: {type(error).__name__}; the log has the traceback") from error
    return 0
