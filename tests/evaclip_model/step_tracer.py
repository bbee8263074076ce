"""Files of this project that the second training step passes through, as two lists in JSON.

Arguments: the job file. The first list is that of the thread that trains, the second that of all
threads, the reader's too.
"""

import json
import sys
import threading
from pathlib import Path

from evaclip_model.training import trainer
from evaclip_model.training.config import TrainJob

PACKAGE = str(Path(trainer.__file__).parents[1]) + "/"


def main(job):
    seen = {True: set(), False: set()}
    traced = threading.get_ident()
    take_step, steps = trainer.TrainingRun.train_step, 0

    def on_call(frame, event, argument):
        file = frame.f_code.co_filename
        if steps == 1 and event == "call" and file.startswith(PACKAGE):
            seen[threading.get_ident() == traced].add(file.removeprefix(PACKAGE))

    def counted(self, *given):
        nonlocal steps
        found = take_step(self, *given)
        steps += 1  # from the end of the first step to the end of the second
        return found

    trainer.TrainingRun.train_step = counted
    threading.setprofile(on_call)
    sys.setprofile(on_call)
    trainer.run_training(job, should_stop=lambda: False)
    sys.setprofile(None)
    print(json.dumps([sorted(seen[True]), sorted(seen[True] | seen[False])]))


main(TrainJob.from_mapping(json.loads(Path(sys.argv[1]).read_text()), where=sys.argv[1]))
