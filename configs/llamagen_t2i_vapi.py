# VA-pi (vapi.py) on LlamaGen-XL (775M) with captions: 256 pixels, the numbers of arXiv 2512.19680's launcher.
#   python train.py configs/llamagen_t2i_vapi.py --data=pictures.tsv      path, a tab, caption (data.py)
#   128 pictures x 8 samples x 256 tokens = 262,144 tokens a step; the policy reads 128 x 256 = 32,768.
#   200 steps: 25,600 pictures. T5 encodes all captions of the list first, so give no more than a run sees:
#   25,600 of 20 tokens are 2 GB in the cache. About 21 GB on the card, by the plan that is printed first.
# Departures: those of llamagen_c2i_vapi.py, and
#  5. Every caption as it is given: there, 30 % of the pictures come with a short second one.
like = "configs/llamagen_c2i_vapi.py"
out_dir = "out/llamagen_t2i_vapi"
gpt_ckpt = "t2i_XL_stage1_256.pt"
vq_ckpt = "vq_ds16_t2i.pt"
context_noise = 0.5         # xi; the paper's table: GenEval .302 at 0, .339 at .5, .329 at .95, base .306
reward = "hps"              # only watched, likewise
max_steps = 200
eval_interval = 50
