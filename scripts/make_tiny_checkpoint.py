"""Creates a complete CosyVoice2 checkpoint with random weights: see light_tts/tools/tiny_checkpoint.py.

python scripts/make_tiny_checkpoint.py --out pretrained_models/tiny                a small one, 4 MB
python scripts/make_tiny_checkpoint.py --out pretrained_models/full --size full    sizes of CosyVoice2-0.5B
"""

from light_tts.tools.tiny_checkpoint import main

if __name__ == "__main__":
    main()
