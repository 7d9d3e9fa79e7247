"""Small stand-ins of MAP's ViLTransformerSS, DCP's CLIPransformerSS and others, with their attributes and calls.

Written from a description of their interfaces; they also repeat the faults that an adapter must live with: in attention
mode MAP's `infer` cuts its features at the wrong places, an unknown missing type gets the previous row's prompt, and
DCP zeroes the features in place.
"""

import torch
import torch.nn.functional as F
from torch import nn

CLASSES = {"hatememes": 2, "food101": 7, "mmimdb": 5}
PROMPT, PROMPTED_LAYERS = 4, 2


def compute(task, pl_module, batch):
    """MAP's and DCP's objectives: the classifier is given the features alone."""
    infer = pl_module.infer(batch)
    logits = getattr(pl_module, f"{task}_classifier")(infer["cls_feats"])
    labels = torch.tensor(batch["label"])
    if task == "mmimdb":
        labels = labels.float()
        loss = F.binary_cross_entropy_with_logits(logits, labels)
    else:
        labels = labels.long()
        loss = F.cross_entropy(logits, labels)
    return {f"{task}_loss": loss, f"{task}_logits": logits, f"{task}_labels": labels}


class TaskModule(nn.Module):
    """What the two share. `config["loss_names"]` says which tasks' classifiers exist."""

    def set_task(self):
        self.current_tasks = [task for task, weight in self.config["loss_names"].items() if weight > 0]

    def forward(self, batch):
        ret = {}
        if not self.current_tasks:
            ret.update(self.infer(batch))
            return ret
        for task in self.current_tasks:
            ret.update(compute(task, self, batch))
        return ret

    def training_step(self, batch, batch_idx=0):
        self.set_task()
        output = self(batch)
        return sum(value for name, value in output.items() if "loss" in name)

    def validation_step(self, batch, batch_idx=0):
        self.set_task()
        self(batch)

    def configure_optimizers(self):
        groups = {True: [], False: []}
        for name, p in self.named_parameters():
            groups[any(head in name for head in [f"{task}_classifier" for task in CLASSES])].append(p)
        return torch.optim.AdamW([{"params": groups[False], "lr": 1e-2}, {"params": groups[True], "lr": 1e-2}])


# -- MAP --------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, mask, prompts=None):
        q, k, v = self.qkv(x).chunk(3, dim=2)
        if prompts is not None:
            half = prompts.shape[1] // 2
            k, v = torch.cat([prompts[:, :half], k], dim=1), torch.cat([prompts[:, half:], v], dim=1)
            mask = torch.cat([mask.new_ones(len(mask), half), mask], dim=1)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None].bool())
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x, mask, prompts=None):
        x = x + self.attn(self.norm1(x), mask, prompts)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, width, depth=3):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def visual_embed(self, image):
        patches = self.patch_embed(image).flatten(2).transpose(1, 2)
        patches = patches[:, torch.randperm(patches.shape[1])]  # As MAP's multinomial does, in eval too.
        x = torch.cat([self.cls_token.expand(len(image), -1, -1), patches], dim=1)
        return x, torch.ones(x.shape[:2], dtype=torch.long)


class Pooler(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, x):
        return self.dense(x[:, 0]).tanh()


class ViLTransformerSS(TaskModule):
    def __init__(self, config):
        super().__init__()
        self.config, width = config, config["hidden_size"]
        self.prompt_type = config["prompt_type"]
        self.text_embeddings = nn.Embedding(30, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.transformer = VisionTransformer(width)
        self.pooler = Pooler(width)
        for task, weight in config["loss_names"].items():
            if weight > 0:
                classifier = nn.Sequential(
                    nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, CLASSES[task])
                )
                setattr(self, f"{task}_classifier", classifier)
        for name in ("complete_prompt", "missing_text_prompt", "missing_img_prompt"):
            setattr(self, name, nn.Parameter(torch.randn(PROMPTED_LAYERS, PROMPT, width)))
        for name, p in self.named_parameters():
            p.requires_grad_(any(part in name for part in ("prompt", "pooler", "classifier")))
        self.current_tasks = []

    def infer(self, batch, mask_text=False, mask_image=False, is_train=None):
        prompts = []
        for missing_type in batch["missing_type"]:
            if missing_type == 0:
                prompt = self.complete_prompt
            elif missing_type == 1:
                prompt = self.missing_text_prompt
            elif missing_type == 2:
                prompt = self.missing_img_prompt
            prompts.append(prompt)
        prompts = torch.stack(prompts)
        text_embeds = self.text_embeddings(batch["text_ids"]) + self.token_type_embeddings.weight[0]
        image_embeds, image_masks = self.transformer.visual_embed(batch["image"][0])
        image_embeds = image_embeds + self.token_type_embeddings.weight[1]
        x = torch.cat([text_embeds, image_embeds], dim=1).detach()
        mask = torch.cat([batch["text_masks"], image_masks], dim=1)
        for i, block in enumerate(self.transformer.blocks):
            if i < PROMPTED_LAYERS and self.prompt_type == "input":
                x = torch.cat([prompts[:, i], x], dim=1)
                mask = torch.cat([mask.new_ones(len(mask), PROMPT), mask], dim=1)
                x = block(x, mask)
            else:
                x = block(x, mask, prompts[:, i] if i < PROMPTED_LAYERS else None)
        x = self.transformer.norm(x)
        length = text_embeds.shape[1]
        skip = PROMPT * PROMPTED_LAYERS if self.prompt_type == "input" else PROMPT  # The latter is wrong, as in MAP.
        text_feats, image_feats = x[:, skip : skip + length], x[:, skip + length :]
        return {
            "text_feats": text_feats,
            "image_feats": image_feats,
            "cls_feats": self.pooler(x[:, skip:] if self.prompt_type == "input" else x),
            "raw_cls_feats": x[:, 0],
            "image_labels": None,
            "image_masks": image_masks,
            "text_labels": batch["text_labels"],
            "text_ids": batch["text_ids"],
            "text_masks": batch["text_masks"],
            "patch_index": None,
        }


class MemPrompt(ViLTransformerSS):
    """Prompts of the batch before the text, and some before the image; without them, MAP's layout."""

    def __init__(self, config, between):
        super().__init__(config)
        self.between = nn.Parameter(torch.randn(1, between, config["hidden_size"]))

    def infer(self, batch, mask_text=False, mask_image=False, is_train=None):
        text = self.text_embeddings(batch["text_ids"])
        image, image_masks = self.transformer.visual_embed(batch["image"][0])
        prompts = self.complete_prompt[0].expand(len(text), -1, -1)
        x = torch.cat([prompts, text, self.between.expand(len(text), -1, -1), image], dim=1)
        for block in self.transformer.blocks:
            x = block(x, x.new_ones(x.shape[:2]))
        x = self.transformer.norm(x)
        return {
            "text_feats": x[:, PROMPT : PROMPT + text.shape[1]],
            "image_feats": x[:, -image.shape[1] :],
            "cls_feats": self.pooler(x[:, PROMPT:]),
            "image_masks": image_masks,
            "text_ids": batch["text_ids"],
        }


# -- DCP --------------------------------------------------------------------------------------------------------------


class CustomCLIP(nn.Module):
    """Small towers that read a prompt of the row's missing type: what the adapter sees of DCP's."""

    def __init__(self, width):
        super().__init__()
        self.prompt_learner = nn.Embedding(3, width)
        self.image_encoder = nn.ModuleDict({"conv1": nn.Linear(3 * 8 * 8, width), "ln_post": nn.LayerNorm(width)})
        self.image_encoder.proj = nn.Parameter(torch.randn(width, width))
        self.text_encoder = nn.ModuleDict({"embedding": nn.EmbeddingBag(128, width), "ln_final": nn.LayerNorm(width)})
        self.text_encoder.text_projection = nn.Parameter(torch.randn(width, width))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def forward(self, image, text, missing_type):
        prompt = self.prompt_learner(torch.tensor(missing_type).long())
        image = self.image_encoder["ln_post"](self.image_encoder["conv1"](image.flatten(1)) + prompt)
        tokens = [torch.tensor([1, *(ord(letter) % 128 for letter in row)]) for row in text]
        offsets = torch.tensor([0, *map(len, tokens[:-1])]).cumsum(0)
        text = self.text_encoder["ln_final"](self.text_encoder["embedding"](torch.cat(tokens), offsets) + prompt)
        return torch.cat([image @ self.image_encoder.proj, text @ self.text_encoder.text_projection], dim=1)


class CLIPransformerSS(TaskModule):
    def __init__(self, config):
        super().__init__()
        self.config, width = config, config["hidden_size"]
        self.model = CustomCLIP(width)
        for task, weight in config["loss_names"].items():
            if weight > 0:
                setattr(self, f"{task}_classifier", nn.Linear(2 * width, CLASSES[task]))
        trainable = ("prompt", "ln_final", "ln_post", "classifier")
        for name, p in self.named_parameters():
            p.requires_grad_(any(part in name for part in trainable) or name.split(".")[-1] == "proj")
        self.current_tasks = []

    def infer(self, batch, mask_text=False, mask_image=False, is_train=None):
        features = self.model(batch["image"][0], batch["text"][0], batch["missing_type"])
        half = features.shape[1] // 2
        for row, missing_type in enumerate(batch["missing_type"]):
            if missing_type == 1:
                features[row, half:] = 0
            if missing_type == 2:
                features[row, :half] = 0
        return {"cls_feats": features}


# -- models that never zero what is missing ---------------------------------------------------------------------------


class Towers(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.image, self.text = nn.Linear(5, width), nn.Linear(6, width)

    def forward(self, image, text):
        return torch.cat([self.image(image), self.text(text)], dim=1)


class MoRA(nn.Module):
    """`cls_head` on [image, text], which is told nothing; `missing_types` in the batch: codes as MAP's."""

    def __init__(self, num_classes=3, width=8):
        super().__init__()
        self.towers = Towers(width)
        self.cls_head = nn.Linear(2 * width, num_classes)

    def forward(self, batch):
        logits = self.cls_head(self.towers(batch["image"], batch["text"]))
        return {"loss": F.cross_entropy(logits, batch["label"]), "logits": logits}


class AOEPT(nn.Module):
    """`classifier` on [image, text], which is told nothing; `missing_masks`: True is missing, the text first."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.model = nn.ModuleDict({"towers": Towers(), "classifier": nn.Linear(16, num_classes)})

    def forward(self, image, text, missing_masks, labels=None):
        logits = self.model["classifier"](self.model["towers"](image, text))
        return logits if labels is None else F.cross_entropy(logits, labels)


def unzeroed_batch(missing_types=(0, 1, 2, 0), seed=0):
    """Of either model: nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.tensor(missing_types)
    return {
        "image": torch.randn(len(codes), 5, generator=generator),
        "text": torch.randn(len(codes), 6, generator=generator),
        "label": torch.randint(0, 3, (len(codes),), generator=generator),
        "missing_types": codes.tolist(),
        "missing_masks": torch.stack([codes == 1, codes == 2], dim=1),
    }


# -- MAP and DCP ------------------------------------------------------------------------------------------------------


def config(*tasks, prompt_type="input"):
    """Only these tasks have a classifier."""
    return {
        "loss_names": {task: int(task in tasks) for task in ("itm", "mlm", *CLASSES)} | {"itm": 0, "mlm": 0},
        "hidden_size": 16,
        "prompt_type": prompt_type,
    }


def map_batch(task="hatememes", missing_type=(0.0, 1.0, 2.0, 0.0, 2.0, 1.0), seed=0):
    """As MAP's collate gives it: a list of one image, lists of floats and of labels."""
    generator = torch.Generator().manual_seed(seed)
    size = len(missing_type)
    image = torch.randn(size, 3, 8, 8, generator=generator)
    text_ids = torch.randint(3, 30, (size, 6), generator=generator)
    text_masks = torch.ones(size, 6, dtype=torch.long)
    for row, code in enumerate(missing_type):
        if code == 1:
            text_ids[row, 2:], text_masks[row, 2:] = 0, 0
        if code == 2:
            image[row] = 1
    batch = {"image": [image], "text_ids": text_ids, "text_masks": text_masks, "missing_type": list(missing_type)}
    return batch | {"text_labels": torch.full_like(text_ids, -100), "label": labels(task, size, generator)}


def dcp_batch(task="hatememes", missing_type=(0.0, 1.0, 2.0, 0.0, 2.0, 1.0), seed=0):
    """As DCP's collate gives it: as MAP's, with a tuple of one list of texts."""
    batch = map_batch(task, missing_type, seed)
    texts = [
        "" if code == 1 else "".join(chr(97 + i % 26) for i in row)
        for code, row in zip(missing_type, batch["text_ids"].tolist(), strict=True)
    ]
    return {name: batch[name] for name in ("image", "missing_type", "label")} | {"text": (texts,)}


def labels(task, size, generator):
    if task == "mmimdb":
        return torch.randint(0, 2, (size, CLASSES[task]), generator=generator).tolist()
    return torch.randint(0, CLASSES[task], (size,), generator=generator).tolist()
