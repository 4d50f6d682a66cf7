def feature_loss(ours, theirs):
    """How far the students' block outputs are from the teacher's: mean over the blocks of the mean squared difference over
    the variance of the teacher's. Lists of (B, ...)."""
    losses = [F.mse_loss(a.float(), b.float()) / b.float().var() for a, b in zip(ours, theirs)]
    return torch.stack(losses).mean()


def qat(teacher, images, cfg, run):
    """Quantization-aware training with learned step sizes (LSQ; Sec. 5.2): one step per weight tensor and activation, the
    full-precision network as the teacher, by its softened outputs and by the outputs of its blocks.

    Open in the paper, chosen here: SGD with momentum 0.9 and a cosine decay, as LSQ has it; BatchNorm statistics stay fixed,
    for those of synthetic images are no better; a tenth of LSQ's learning rates, because networks with fixed statistics do not
    bear more (ResNet-20 at 4 bits, real images: 0.01 leaves it at 22 %); the feature loss normalised by the teacher's
    variance; no labels.
    Arguments and result as `ptq`.
    """
    teacher, example = run.adopt(teacher)
    student = quantize(teacher, cfg.wbits, cfg.abits, cfg.act_placement, example=example)
    if not isinstance(student, fx.GraphModule):
        raise InputError("the model cannot be traced, so its blocks cannot be found; give one whose forward does not branch")
    blocks = find_blocks(student, teacher)
    raise_ends(student, cfg)
    for _, layer in quantized_layers(student):
        register_parametrization(layer, "weight", LearnedWeight(layer.weight, layer.bits))
        layer.packed = True  # its weight is quantized by the parametrization
    steps = {name: LearnedStep(act.bits, lsq=True).to(run.device) for name, act in quantized_activations(student)}
    for name, step in steps.items():
        student.set_submodule(name, step)
    full, modules = dict(trace(teacher, example).named_modules()), dict(student.named_modules())
    x, draw = sampler(images, cfg.qat_batch_size, run.device)
    begin_steps(lambda: student(draw()), steps.values())
    scales = [p for name, p in student.named_parameters() if name.endswith("scale")]
    others = [p for name, p in student.named_parameters() if not name.endswith("scale")]
    groups = [{"params": others, "weight_decay": cfg.qat_weight_decay}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, cfg.qat_lr, momentum=0.9, nesterov=True, fused=run.fused)

    def outputs(x, modules, quantized):
        """What each block sends; the last sends the logits."""
        sent = []
        for block in blocks:
            x = block(x, modules, quantized)
            sent.append(x)
        return sent

    def iteration():
        with run.autocast():
            with torch.no_grad():
                theirs = outputs(x, full, False)
            ours = outputs(x, modules, True)
        p, q = (F.log_softmax(sent[-1].float() / cfg.temperature, 1) for sent in (theirs, ours))
        kd = cfg.temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)
        features = feature_loss(ours[:-1], theirs[:-1]) if len(blocks) > 1 else torch.zeros_like(kd)
        run.update(optimizer, kd + cfg.feature_weight * features)
        run.log(kd=kd, features=features)

    step, run.rates = run.capture(iteration, optimizer), "--qat-lr"
    for epoch in run.epochs(cfg.epochs, student, None, optimizer=optimizer):
        for group in optimizer.param_groups:
            group["lr"] = cfg.qat_lr * 0.5 * (1 + math.cos(math.pi * epoch / cfg.epochs))
        for _ in run.steps():
            draw()
            step()
    for _, layer in quantized_layers(student):
        learned, weight = layer.parametrizations.weight[0], layer.weight.detach()
        remove_parametrizations(layer, "weight")
        column = (len(weight),) + (1,) * (weight.ndim - 1)
        layer.pack(weight, *(value.detach().expand(column).clone() for value in (learned.scale, learned.zero_point)))
    for name, step in steps.items():
        act = QuantAct(step.bits).to(run.device)
        act.fix(step.scale, step.zero_point)
        student.set_submodule(name, act)
    return student.requires_grad_(False)
