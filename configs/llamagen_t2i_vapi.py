# VA-pi (vapi.py) on LlamaGen-XL (775M) with captions: 256 pixels, numbers of arXiv 2512.19680's launcher.
#   python train.py configs/llamagen_t2i_vapi.py --data=images.tsv      path, a tab, caption (full/data.py)
#   128 images x 8 samples x 256 tokens = 262,144 tokens per step. The policy reads 128 x 256 = 32,768 tokens.
#   200 steps use 25,600 images. T5 encodes all captions of the list first, so list no more than a run uses.
#   25,600 captions of 20 tokens take 2 GB in the cache. The GPU needs about 21 GB, calculated, not measured.
# Departures: those of llamagen_c2i_vapi.py, and
#  5. Every caption is used as given. In the launcher, 30 % of the images have a short second caption.
like = "configs/llamagen_c2i_vapi.py"
out_dir = "out/llamagen_t2i_vapi"
gpt_ckpt = "t2i_XL_stage1_256.pt"
vq_ckpt = "vq_ds16_t2i.pt"
context_noise = 0.5         # xi; GenEval in the paper: .302 at 0, .339 at .5, .329 at .95, base .306
reward = "hps"              # only reported too
max_steps = 200
eval_interval = 50
