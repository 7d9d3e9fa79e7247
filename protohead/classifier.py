"""A whole model: encoders that run on the rows that have their modality, and a head on what they say."""

import os
from collections.abc import Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from protohead.checkpoint import frozen_modules, load_model, save_model
from protohead.encoding import Encoder, check_inputs, encode_present, encode_rows, joint_rows
from protohead.head import DecoupledPrototypeHead
from protohead.inputs import Present, check_labels
from protohead.objective import Objective, encode_subcases, read_objective
from protohead.sharding import has_ranks, is_collective, run_blank, zero_of

__all__ = ["PrototypeClassifier"]


class PrototypeClassifier(nn.Module):
    """Encoders and a :class:`~protohead.DecoupledPrototypeHead`; each encoder runs on the rows that have its modality.

    Encoders whose parameters are all frozen stay in eval mode, and so do the frozen parts of the others.

    Args:
        encoders: Name of each of the head's modalities to its encoder: a module, a bound method of one (such as
            ``clip.encode_image``), or a function, whose own parameters are then not this module's. It is called with
            the n rows that have the modality (a mapping becomes keyword arguments) and returns their (n, D_m)
            features, or an object that holds them as `pooler_output`. Or one joint encoder, for models in which the
            modalities meet: ``encoder(inputs, present)``, called with all the rows, returns name to (B, D_m).
        head: The head.

    Attributes:
        encoders: The encoders that are modules, by the names of what they encode: ``"image"``, or ``"image+text"``
            for a module that encodes both.
        head: The head.

    Raises:
        ValueError: If the encoders are not those of the head's modalities.
        TypeError: If an encoder cannot be called.

    Example:
        >>> head = DecoupledPrototypeHead({"image": 4, "text": 3}, num_classes=5)
        >>> model = PrototypeClassifier({"image": nn.Linear(8, 4), "text": nn.Linear(6, 3)}, head)
        >>> inputs = {"image": torch.randn(2, 8), "text": [None, torch.randn(6)]}  # row 0 has no text
        >>> model(inputs).shape
        torch.Size([2, 5])
        >>> model.head.seen.tolist()  # rows with an image, rows with a text
        [[2.0, 1.0]]
    """

    def __init__(self, encoders: Mapping[str, Encoder] | Encoder, head: DecoupledPrototypeHead) -> None:
        super().__init__()
        if isinstance(encoders, nn.ModuleDict):
            encoders = dict(encoders.items())
        joint = not isinstance(encoders, Mapping)
        if not isinstance(encoders, Mapping):
            encoders = dict.fromkeys(head.modalities, encoders)
        if set(encoders) != set(head.modalities):
            raise ValueError(f"Expected encoders of the head's {head.modalities}, but got {tuple(encoders)}.")
        for name, encoder in encoders.items():
            if not callable(encoder) or isinstance(encoder, type):
                raise TypeError(f"Expected a module or function as the encoder of {name!r}, but got {encoder!r}.")
        self._joint = joint
        self._functions: dict[str, Encoder] = {}
        self._places: dict[str, tuple[str, str]] = {}  # A modality to its encoder's key and the name of its method.
        owners: dict[int, tuple[nn.Module, list[str]]] = {}
        for name in head.modalities:
            owner = getattr(encoders[name], "__self__", encoders[name])
            if isinstance(owner, nn.Module):
                owners.setdefault(id(owner), (owner, []))[1].append(name)
            else:
                self._functions[name] = encoders[name]
        # A module that encodes several modalities is registered once: two names would be two copies in a checkpoint.
        self.encoders = nn.ModuleDict({"+".join(names): owner for owner, names in owners.values()})
        for owner, names in owners.values():
            for name in names:
                method = "" if encoders[name] is owner else encoders[name].__name__
                if method and getattr(owner, method, None) != encoders[name]:  # It is looked up anew at each call.
                    raise ValueError(
                        f"Expected the encoder of {name!r} to be its module's own {method!r}, but it is not."
                    )
                self._places[name] = "+".join(names), method
        self.head = head
        self.train(self.training)

    def forward(
        self,
        inputs: Mapping[str, Any],
        present: Present | None = None,
        labels: Tensor | None = None,
        objective: Objective | Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Logits; with `labels` the margins are applied, for the loss.

        Args:
            inputs: Name of a modality to what its encoder takes, for all B rows: a tensor, a mapping of tensors (such
                as a tokenizer's output), or a list with None, or pandas' NaN, for missing rows. A list of tensors
                reaches the encoder stacked, any other as a list. A modality that is None or left out is missing in
                every row. Encoders are given the rows that are present, in their dtype; in a recorded graph, which
                takes tensors only, every row, with blanks where a modality is missing.
            present: (B, M) bool, columns in the order of ``head.modalities``, best on the CPU, where it is read; or
                columns by name. By default a modality is present in a row unless it is None in a list, or all zeros in
                a tensor (in all the tensors of a mapping). What stands in a missing row is never encoded.
            labels: As in the head.
            objective: Return the loss with these options of :meth:`loss`, as in ``{"prototype_weight": 0.9}`` or
                ``{}``, instead of logits: for DDP and FSDP2, under which all that trains goes through forward.

        Returns:
            (B, K) logits, as the head's; or the loss, a scalar.

        Raises:
            ValueError: If names, shapes or batch sizes are not as said; if the inputs contradict `present`; if an
                encoder returns other than (n, D_m).
            TypeError: If a type is not as said.
        """
        mask, rows = check_inputs(inputs, present, self.head.modalities), None
        if objective is not None and labels is not None and self._is_by_case():
            check_labels(labels, mask.shape[0], self.head.num_classes)
            rows, mask, objective = encode_subcases(mask, read_objective(objective, self.head.num_classes))
            labels = labels[rows.to(labels.device)]
        features = self._encode(inputs, mask, rows)
        result: Tensor = self.head(features, mask.to(self._device()), labels, objective)
        return result

    def loss(self, inputs: Mapping[str, Any], present: Present | None, labels: Tensor, **options: Any) -> Tensor:
        """The whole training objective of a batch, as the head's :meth:`~protohead.DecoupledPrototypeHead.loss`.

        With prompts, a complete row is also encoded as the rows without text and without image that it could be, which
        doubles what it costs: see `subcase_share` in :class:`~protohead.objective.Objective`.

        Args:
            inputs: As in :meth:`forward`.
            present: As in :meth:`forward`.
            labels: As in :meth:`forward`.
            **options: As in the head's.

        Returns:
            A scalar.

        Raises:
            ValueError: As :meth:`forward`, or if an option is not as said.
            TypeError: As :meth:`forward`.
        """
        total: Tensor = self(inputs, present, labels, options)
        return total

    def encode(self, inputs: Mapping[str, Any], present: Present | None = None) -> dict[str, Tensor]:
        """The features, zeros where a modality is missing: to be cached, and given to the head later.

        Args:
            inputs: As in :meth:`forward`.
            present: As in :meth:`forward`.

        Returns:
            Name to (B, D_m), such that ``model.head(model.encode(inputs, present), present)`` are the model's logits.

        Raises:
            ValueError: As :meth:`forward`.
            TypeError: As :meth:`forward`.
        """
        return self._encode(inputs, check_inputs(inputs, present, self.head.modalities))

    def train(self, mode: bool = True) -> "PrototypeClassifier":
        """Set training mode, except in what is frozen."""
        super().train(mode)
        for module in frozen_modules(self):
            module.training = False
        return self

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the head, and what is trainable in the encoders, to a safetensors file.

        What is frozen now is not in it, only some numbers of each parameter, by which :meth:`load` recognises another
        backbone. With sharded parameters (FSDP2) every rank must call this, and rank 0 writes.
        """
        save_model(self, path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read what :meth:`save` wrote, into a model of the same encoders and an equal head.

        With sharded parameters (FSDP2) every rank must call this.

        Raises:
            ValueError: If the file is not such a file, or is of another head, other encoders, or other weights of
                frozen parts. The model is then as it was.
        """
        load_model(self, path)

    # -- the steps ----------------------------------------------------------------------------------------------------

    def _device(self) -> torch.device:
        return next(chain(self.head.buffers(), self.head.parameters())).device  # Of a head of one's own, too.

    def _is_by_case(self) -> bool:
        """Whether an encoder says that features depend on the missing case, as prompts do; it takes `rows`, too."""
        return self._joint and getattr(self._encoder(self.head.modalities[0]), "by_case", False)

    def _encode(self, inputs: Mapping[str, Any], present: Tensor, rows: Tensor | None = None) -> dict[str, Tensor]:
        """The features of a batch, or of these rows of it, in cases that they could be."""
        widths, batch = self.head.in_features, present.shape[0]  # len() would fix the batch size of an exported graph.
        if self._joint:
            columns = dict(zip(widths, present.T, strict=True))
            encoder = self._encoder(self.head.modalities[0])
            features = joint_rows(encoder if rows is None else partial(encoder, rows=rows), inputs, columns)
        else:
            features = {}
            for m, (name, width) in enumerate(widths.items()):
                x = encode_present(name, self._encoder(name), inputs.get(name), present[:, m])
                if x is None:
                    x = torch.zeros(batch, width, device=self._device()) + self._join(name, inputs)
                features[name] = x
        for name, width in widths.items():
            if features[name].shape != (batch, width):
                got = tuple(features[name].shape[1:])
                raise ValueError(f"Expected the encoder of {name!r} to return {width} features a row, but got {got}.")
        return features

    def _encoder(self, name: str) -> Encoder:
        if name in self._functions:
            return self._functions[name]
        key, method = self._places[name]
        encoder: Encoder = getattr(self.encoders[key], method) if method else self.encoders[key]
        return encoder

    def _join(self, name: str, inputs: Mapping[str, Any]) -> Tensor | float:
        """A zero that keeps an encoder in this rank's graph although no row needs it, as DDP and FSDP2 want."""
        if not has_ranks() or name in self._functions:
            return 0.0
        module, encoder = self.encoders[self._places[name][0]], self._encoder(name)
        if is_collective(module, name):
            return zero_of(
                [run_blank(module, partial(encode_rows, name, encoder, count=1), name, inputs)], self._device()
            )
        return zero_of([p for p in module.parameters() if p.requires_grad], self._device())
