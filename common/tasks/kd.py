class Generator(nn.Module):
    """DAFL's generator for small images: noise (B, latent_dim) -> images (B, channels, size, size), standardised.

    Args:
        image_size: side of the images, a multiple of 4.
        channels: of the images.
        latent_dim: length of the noise vector.
    """

    def __init__(self, image_size=32, channels=3, latent_dim=1000):
        super().__init__()
        self.side = image_size // 4
        self.linear = nn.Linear(latent_dim, 128 * self.side**2)
        self.bn0 = nn.BatchNorm2d(128)
        self.conv1 = nn.Conv2d(128, 128, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(128, eps=0.8)
        self.conv2 = nn.Conv2d(128, 64, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(64, eps=0.8)
        self.conv3 = nn.Conv2d(64, channels, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(channels, affine=False)

    def forward(self, z):
        x = self.linear(z).view(len(z), 128, self.side, self.side)
        x = F.leaky_relu(self.bn1(upsample_conv(self.bn0(x), self.conv1)), 0.2)
        x = F.leaky_relu(self.bn2(upsample_conv(x, self.conv2)), 0.2)
        return self.bn3(torch.tanh(self.conv3(x)))


def dafl_loss(logits, features, cfg):
    """What DAFL's generator minimises (Chen et al., ICCV 2019): one-hot, information entropy and activation terms.

    Args:
        logits: the teacher's, (B, C).
        features: what enters its last layer, (B, D).
    """
    log_p = F.log_softmax(logits, 1)
    one_hot = F.nll_loss(log_p, logits.argmax(1))
    mean = log_p.exp().mean(0)
    information = (mean * mean.clamp(min=1e-12).log10()).sum()
    return cfg.one_hot_weight * one_hot + cfg.information_weight * information - cfg.activation_weight * features.abs().mean()


def kd(teacher, images, cfg, run):
    """Distil the teacher into --student-arch (Sec. 5.4), from random weights.

    Without --images it is DAFL's loop, in which a generator is trained beside the student; with data source "mixmix" its
    generator also minimises the MixMix objective (Eq. 6) of its images, pseudo-labelled by the teacher and mixed (Eq. 8, 9),
    over the teacher and m' - 1 further networks of the zoo, drawn anew in every epoch; "single" is DAFL alone. The weights
    of the added terms are open in the paper: --ce-weight and --kd-bn-weight. With images the student learns from them alone,
    shifted and mirrored, labelled anew by the teacher each time.

    Args:
        teacher: a trained network, left as it is.
        images: (N, channels, H, W), normalised for it, or None.
        cfg: from `config(...)`, or the command line.
        run: what surrounds the loop.

    Returns:
        The student, in eval mode.
    """
    device, channels = run.device, input_channels(teacher)
    teacher = run.place(copy.deepcopy(teacher)).eval().requires_grad_(False)
    student = run.place(build_student(cfg.student_arch, teacher, cfg.num_classes, cfg.image_size))
    sgd = torch.optim.SGD(student.parameters(), cfg.kd_lr, momentum=0.9, weight_decay=5e-4, fused=run.fused)
    stateful, optimizers, zoo, generator = {"sgd": sgd}, [sgd], [], None
    if images is None:
        if cfg.image_size > SMALL_IMAGE or cfg.image_size % 4:
            raise InputError(f"--image-size is {cfg.image_size}; DAFL's generator makes up to {SMALL_IMAGE}, in fours")
        generator = run.place(Generator(cfg.image_size, channels, cfg.kd_latent_dim))
        adam = torch.optim.Adam(generator.parameters(), cfg.kd_lr_g, fused=run.fused)
        stateful |= {"generator": generator, "adam": adam}
        optimizers.append(adam)
        if cfg.data_source == "mixmix":
            normalisation = list(cfg.mean or [0.0] * channels), list(cfg.std or [1.0] * channels)
            zoo.append(ZooModel(cfg.arch, teacher, normalisation, normalisation).to(device))
            others, _ = load_zoo([name for name in cfg.zoo if name != cfg.arch], cfg, normalisation)
            zoo += [run.place(model) for model in others]
            if cfg.zoo_sample > len(zoo):
                raise InputError(f"--zoo-sample is {cfg.zoo_sample} and there are {len(zoo)} models with the teacher; lower it")
    else:
        batch, draw = sampler(images, cfg.kd_batch_size, device)
    seen, last = {}, [m for m in teacher.modules() if isinstance(m, nn.Linear)]
    if images is None and not last:
        raise InputError("the teacher has no linear layer, whose input DAFL's activation term needs; distil with --images")
    if last:
        last[-1].register_forward_pre_hook(lambda _, args: seen.update(features=args[0]))

    def generator_step(models):
        with run.autocast():
            x = generator(torch.randn(cfg.kd_batch_size, cfg.kd_latent_dim, device=device)).float()
            logits = teacher(x).float()
        loss = dafl_loss(logits, seen.pop("features").float(), cfg)
        if cfg.data_source == "mixmix":
            losses = mixmix_loss([zoo[index] for index in models], x, logits.argmax(1), cfg, run.autocast)
            loss = loss + cfg.ce_weight * losses["ce"] + cfg.kd_bn_weight * losses["bn"]
            run.log(bn=losses["bn"])
        run.update(adam, loss)
        run.log(loss_g=loss)
        return x.detach(), logits.detach()

    def iteration(models):
        if generator is None:
            x = jitter(batch, cfg.image_size // 8, flip=True)
            with torch.no_grad(), run.autocast():
                logits = teacher(x).float()
        else:
            x, logits = generator_step(models)
        with run.autocast():
            ours = student(x).float()
        loss = F.kl_div(F.log_softmax(ours, 1), F.log_softmax(logits, 1), reduction="batchmean", log_target=True)
        run.update(sgd, loss)
        run.log(loss_q=loss)

    def synthesize(y):
        """Images for samples; what they show is the generator's choice."""
        return generator(torch.randn(len(y), cfg.kd_latent_dim, device=device)).float()

    step, run.rates = run.capture(iteration, *optimizers), "--kd-lr or --kd-lr-g"
    for epoch in run.epochs(cfg.epochs, student, synthesize, **stateful):
        sgd.param_groups[0]["lr"] = cfg.kd_lr * 0.1 ** sum(5 * epoch >= part * cfg.epochs for part in (2, 4))
        drawn = torch.Generator().manual_seed((cfg.seed * 1_000_003 + epoch) % 2**63)
        others = 1 + torch.randperm(max(len(zoo) - 1, 0), generator=drawn)[: cfg.zoo_sample - 1]
        models = (0, *sorted(others.tolist()))
        student.train()
        for _ in run.steps():
            if generator is None:
                draw()
            step(models)
        student.eval()
    return student
