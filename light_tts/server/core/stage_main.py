"""Entry of every stage process; torch is imported only by the stage's own module.

    python -m light_tts.server.core.stage_main --run_dir ROOT --stage decode --index 0 \
        --incarnation 0 --address ipc://... --supervisor PID
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import traceback
from pathlib import Path

import zmq

from light_tts.common import log, process
from light_tts.common.garbage import spare_present_objects
from light_tts.common.imports import importing
from light_tts.kernels import compilers
from light_tts.server.core import gpu_memory, messages, settings
from light_tts.server.core.channel import Inbox, Outbox, Peers
from light_tts.server.core.heartbeat import Heartbeat
from light_tts.server.core.rundir import RunDir
from light_tts.server.core.stage import StageContext


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--incarnation", type=int, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--supervisor", type=int, required=True)
    args = parser.parse_args()

    # The supervisor ends a stage with Shutdown or SIGKILL; a signal to the process group must not.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    process.die_with_parent(args.supervisor)

    config = settings.load(str(args.run_dir / "settings.json"))
    run_dir = RunDir.open(args.run_dir, config.zmq_mode)
    run_dir.register_process()
    name = f"{args.stage}-{args.index}"
    log.setup(name, config.log_level, run_dir.log if config.log_dir else None, config.log_format)

    inbox, outbox = Inbox(args.address), Outbox()
    ctx = StageContext(
        settings=config,
        run_dir=run_dir,
        stage=args.stage,
        index=args.index,
        incarnation=args.incarnation,
        inbox=inbox,
        outbox=outbox,
        peers=Peers(outbox),
        log=logging.getLogger(f"light_tts.{args.stage}"),
        heartbeat=Heartbeat(run_dir.heartbeat(args.stage, args.index, args.incarnation)),
        loaded=spare_present_objects,
    )
    code = _run(ctx)
    inbox.close()
    outbox.close(linger=2.0)
    zmq.Context.instance().term()  # waits until the last messages have been sent
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # skip the teardown: nothing is left to save, and GPU libraries can hang in it


def _await_topology(ctx: StageContext) -> None:
    """Apply the supervisor's first message, and keep jobs from other senders that arrived before it."""
    waiting: list[messages.Message] = []
    while not ctx.peers.stages:
        for message in ctx.inbox.wait():
            if isinstance(message, messages.Topology):
                ctx.peers.apply(message)
            else:
                waiting.append(message)
    ctx.inbox.put_back(waiting)


def _run(ctx: StageContext) -> int:
    """Run the stage until it ends; return its exit code."""
    try:
        gpu_memory.choose_allocator(ctx.settings, ctx.stage)
        if gpu_memory.uses_gpu(ctx.settings, ctx.stage):
            compilers.prepare()
        with importing():
            manager = importlib.import_module(f"light_tts.server.tts_{ctx.stage}.manager")
        ctx.startup.end("imports")
        _await_topology(ctx)
        gpu_memory.share(ctx.settings, ctx.stage, ctx.index)
        ctx.startup.end("GPU")
        manager.run(ctx)
        return 0
    except BaseException as error:  # a stage must report every cause of its end
        if ctx.is_ready:
            ctx.log.exception("%s ended with an error", ctx.name)
        else:
            ctx.log.debug("%s cannot start", ctx.name, exc_info=True)
            _report_start_failure(ctx, error)
        return 1


def _report_start_failure(ctx: StageContext, error: BaseException) -> None:
    """Report one line to the operator, and log the traceback if the error is not one of ours."""
    ours = type(error).__module__.startswith("light_tts")
    if not ours:
        traceback.print_exception(error, file=sys.stderr)
    text = " ".join(str(error).split())
    reason = text if ours and text else f"{type(error).__name__}: {text}"
    ctx.outbox.send(
        ctx.run_dir.supervisor,
        messages.StageStartFailed(
            stage=ctx.stage, index=ctx.index, incarnation=ctx.incarnation, reason=reason
        ),
    )


if __name__ == "__main__":
    main()
