"""Set before anything is imported: no progress bars, no hub, no windows."""
import os

for name, value in dict(TQDM_DISABLE='1', HF_HUB_OFFLINE='1', HF_HUB_DISABLE_TELEMETRY='1', TOKENIZERS_PARALLELISM='false',
                        WANDB_MODE='disabled', MPLBACKEND='agg').items():
    os.environ.setdefault(name, value)
